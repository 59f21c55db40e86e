"""What a pruning method is: it removes whole experts or intermediate channels, and the architecture stays what it was.

Unlike the factors of a `Method`, what remains is a plain checkpoint with smaller sizes in its `config.json`, which any
program loads that loads the original. Every layer, and every expert, keeps the same number: stock architectures know no
other. A pruning method says which ones stay, and with what weights; the engine does the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.method import Evidence, Outcome, check_setting

UNITS = ("experts", "channels")
"""What can be removed: whole experts, or intermediate channels of every expert."""


class Pruned(NamedTuple):
    """What remains of one layer.

    kept: ascending indices, of experts `[keep]` or of every expert's channels `[expert, keep]`; weights: projections
    that are not just slices of the original, `[expert, out, in]`; outcomes: what the user should know.
    """

    kept: np.ndarray
    weights: Mapping[str, np.ndarray] = {}
    outcomes: tuple[Outcome, ...] = ()


class PruningMethod(NamedTuple):
    """A method that removes experts or channels.

    Args:
        name: as the command line spells it.
        summary: one line for the help text.
        settings: a frozen dataclass, `PruningSettings` or one that extends it.
        unit: what it removes, one of `UNITS`.
        fit: `(evidence, keep, settings, *, groups) -> Pruned` for one layer: `evidence.statistic(name)` and
            `evidence.weight(projection)` read what it wants, `evidence.moment` is the second moment of the intermediate
            activations; `groups` of the experts have to keep equal numbers.
        requires: `(settings) -> {statistic: mend}` as for `Method`.
        allocation: always "uniform".
    """

    name: str
    summary: str
    settings: type
    unit: str
    fit: Callable[..., Pruned]
    requires: Callable[[Any], Mapping[str, str]]
    allocation: str = "uniform"

    kind = "remove"


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """Settings of the methods that remove experts.

    Args:
        setting: "paper" or "improved".
        multiple: what is kept is a multiple of this number; serving engines like 8 experts.
    """

    setting: str = "improved"
    multiple: int = 1

    def __post_init__(self):
        check_setting(self.setting)
        if self.multiple < 1:
            raise JaxmoeError(f"multiple={self.multiple}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class ChannelSettings(PruningSettings):
    """Settings of the methods that remove channels.

    Args:
        multiple: what is kept is a multiple of this number. PyTorch multiplies the experts' matrices in one product
            only where rows are multiples of 16 bytes, which are 8 channels; serving engines like 128.
    """

    multiple: int = 8


MEND = "calibrate with --text, or give --statistics"


def needs(*names: str) -> Callable[[Any], Mapping[str, str]]:
    """Return that a method needs some statistics, for `PruningMethod.requires`.

    Example:
        >>> needs("counts")(None)
        {'counts': 'calibrate with --text, or give --statistics'}
    """
    return lambda settings: dict.fromkeys(names, MEND)


def statistic(evidence: Evidence, name: str) -> np.ndarray:
    """Return a statistic that a method requires."""
    found = evidence.statistic(name)
    if found is None:
        raise JaxmoeError(f"the statistics lack {name}: {MEND}")
    return np.asarray(found)
