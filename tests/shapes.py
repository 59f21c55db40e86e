"""The checks of shapes and types that the tests run `jaxmoe` under: jaxtyping's import hook with beartype.

All arguments and results of every function that takes or returns arrays are checked, and the fields of dataclasses
that hold some; what is compiled is checked while it is traced. To check all others too would cost time for no shapes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, get_args

from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import AbstractArray, config
from numpy.typing import ArrayLike

# Functions are checked one by one, which leaves open what `Self` is; and no tuple is what numpy calls a sequence.
UNCHECKED = FrozenDict({Self: Any, ArrayLike: Any})

CONFIGURATION = BeartypeConf(is_pep484_tower=True, hint_overrides=UNCHECKED)


def checked(function: Callable) -> Callable:
    """Return the function with checks of its arguments and results, if there are arrays among them."""
    hints = function.__annotations__.values()
    return beartype(function, conf=CONFIGURATION) if any(map(_of_arrays, hints)) else function


def _of_arrays(hint: Any) -> bool:
    own = isinstance(hint, type) and issubclass(hint, AbstractArray)
    return own or any(map(_of_arrays, get_args(hint)))


@contextmanager
def unchecked() -> Iterator[None]:
    """Turn the checks off, for calls that `jaxmoe` itself has to refuse."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)
