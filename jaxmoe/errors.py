"""The exceptions that a user is meant to read, and what keeps their messages readable."""

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class JaxmoeError(ValueError):
    """Something that the user can mend: the message names the offender, the reason and the mend.

    The command line prints the message alone and exits with 1; any other exception is a defect of jaxmoe.

    Example:
        >>> raise JaxmoeError("ratio 1.2 is not a removed fraction: give a number between 0 and 1")
        Traceback (most recent call last):
        ...
        jaxmoe.errors.JaxmoeError: ratio 1.2 is not a removed fraction: give a number between 0 and 1
    """


class StorageError(JaxmoeError):
    """What lies on the disk is in the way: no space, no permission, a changed record, another run at work.

    It says nothing of what was asked for: once it is mended, the same command resumes.

    Example:
        >>> raise StorageError("out is a file: remove it, or choose another output folder")
        Traceback (most recent call last):
        ...
        jaxmoe.errors.StorageError: out is a file: remove it, or choose another output folder
    """


def readable(message: str) -> str:
    """Return a message with its longest words shortened: names and values may have thousands of letters.

    Example:
        >>> len(readable(f"--method {'x' * 5_000}: there is no such method"))
        248
    """
    return re.sub(r"\S{300,}", lambda word: shortened(word.group()), message)


def shortened(text: str, most: int = 200) -> str:
    """Return a text, or its two ends where it is longer than so many letters: what a message says of an odd value.

    Example:
        >>> shortened("3" * 5_000, 20)
        '3333333333...3333333 (5000 letters)'
    """
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2 - 3) :]} ({len(text)} letters)"


def called_as(call: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator by which a wrong call of a function, such as one of an earlier version, names the right one.

    Args:
        call: how the function is called.

    Example:
        >>> @called_as("double(number)")
        ... def double(number):
        ...     return 2 * number
        >>> double(n=3)
        Traceback (most recent call last):
        ...
        TypeError: double: missing a required argument: 'number'; call double(number)
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}: {error}; call {call}") from None
            return function(*args, **kwargs)

        return checked

    return decorate
