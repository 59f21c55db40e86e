"""The one exception that a user is meant to read."""


class JaxmoeError(ValueError):
    """Something that the user can mend: the message names the offender, the reason and the mend.

    The command line prints the message alone and exits with 1; any other exception is a defect of jaxmoe.

    Example:
        >>> raise JaxmoeError("ratio 1.2 is not a removed fraction: give a number between 0 and 1")
        Traceback (most recent call last):
        ...
        jaxmoe.errors.JaxmoeError: ratio 1.2 is not a removed fraction: give a number between 0 and 1
    """
