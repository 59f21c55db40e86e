"""What stands in `config.json` beside a term's tensors: a msgspec type for each term, checked while it is read.

Kinds, ranges and unknown keys are refused there; what whole numbers in tensors must be is checked by the terms, with
the functions at the end.
"""

from types import GenericAlias
from typing import Annotated, Any

import msgspec
import numpy as np

from jaxmoe.errors import JaxmoeError

LARGEST = 2**31 - 1
"""Of any size or place: both are int32 in files."""

Size = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
"""A number of things of which there is at least one."""

Number = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
"""A number of things of which there may be none."""


def as_spec(value: Any, kind: type | GenericAlias, where: str) -> Any:
    """Return a record of decoded JSON as a type, for the core, which knows no files.

    Args:
        value: dictionaries, lists, text and numbers.
        kind: a type that msgspec converts to.
        where: what holds the value, for the message.

    Raises:
        JaxmoeError: the value does not fit; the message names the place.

    Example:
        >>> as_spec({"rank": -1}, dict[str, Size], "down.0")
        Traceback (most recent call last):
            ...
        jaxmoe.errors.JaxmoeError: down.0: Expected `int` >= 1 - at `$[...]`
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeError, RecursionError) as error:
        raise JaxmoeError(f"{where}: {error}") from None


class TermSpec(msgspec.Struct, tag_field="kind", forbid_unknown_fields=True):
    """What a reader needs beside a term's tensors; the tag of a term's own `Spec` is its kind."""


def check_order(order: Any, experts: int) -> None:
    """Raise unless an order names each expert once.

    Example:
        >>> check_order(np.array([[0, 2, 2]]), 3)
        Traceback (most recent call last):
            ...
        jaxmoe.errors.JaxmoeError: order [0, 2, 2] does not name each of the experts 0 to 2 once
    """
    own = np.asarray(order).reshape(-1)
    if not np.array_equal(np.sort(own), np.arange(experts)):
        raise JaxmoeError(f"order {shortened(own)} does not name each of the experts 0 to {experts - 1} once")


def shortened(numbers: np.ndarray, most: int = 32) -> str:
    """Return a list of numbers for a message.

    Example:
        >>> shortened(np.arange(9), most=2)
        '[0, 1, ...]'
    """
    first = ", ".join(map(str, numbers[:most].tolist()))
    return f"[{first}{', ...' if len(numbers) > most else ''}]"
