"""The checks of types and shapes that the tests run `jaxmoe` under: jaxtyping's import hook with beartype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import config
from numpy.typing import ArrayLike

# Functions are checked one by one, which leaves open what `Self` is; and no tuple is what numpy calls a sequence.
UNCHECKED = FrozenDict({Self: Any, ArrayLike: Any})

checked = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=UNCHECKED))


@contextmanager
def unchecked() -> Iterator[None]:
    """Turn the checks off, for calls that `jaxmoe` itself has to refuse."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)
