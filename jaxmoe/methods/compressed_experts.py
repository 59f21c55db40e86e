"""Compressed Experts (arXiv 2503.00634): fewer experts run, and small vectors compensate for the others.

The main experts read their inputs scaled by the mean of the vectors of the token's other experts, weighted by the
router (`model.compressed_experts`). The paper trains the vectors with the whole model (`jaxmoe recover`); the improved
setting learns them layer by layer from what each layer gave when all chosen experts ran (`compression.expert_vectors`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.method import check_setting, no_requirements
from jaxmoe.model.compressed_experts import RENORMS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the vectors that compensate for experts are found from text.

    Args:
        setting: "improved"; "paper" has no way to find them without training the whole model, see `jaxmoe recover`.
        renorm: what becomes of the main experts' weights, one of `model.compressed_experts.RENORMS`.
        steps: of Adam at most, for each layer.
        rate: its learning rate at the start, which falls to nothing along a cosine.
        batch: tokens of a step.
        patience: stop after so many checks, one every 50 steps, without a smaller error on the tokens set apart.
    """

    setting: str = "improved"
    renorm: str = "none"
    steps: int = 400
    rate: float = 0.02
    batch: int = 512
    patience: int = 4

    def __post_init__(self):
        check_setting(self.setting)
        if self.renorm not in RENORMS:
            raise JaxmoeError(f"renorm {self.renorm!r}: give {' or '.join(RENORMS)}")
        if self.steps < 1 or self.batch < 1 or self.patience < 1 or not 0 < self.rate < 1:
            raise JaxmoeError(
                f"steps={self.steps}, batch={self.batch}, patience={self.patience}, rate={self.rate}: give numbers of"
                " at least 1, and a rate between 0 and 1"
            )


class SkippingMethod(NamedTuple):
    """A method that runs fewer experts for every token: it is asked for a number of experts, not for a ratio.

    Args:
        name: as the command line spells it.
        summary: one line for the help text.
        settings: `Settings`.
        requires: `(settings) -> {statistic: mend}` as for `Method`; none.
    """

    name: str
    summary: str
    settings: type[Settings]
    requires: Callable[[Any], Mapping[str, str]] = no_requirements

    kind = "skip"


COMPRESSED_EXPERTS = SkippingMethod(
    "compressed_experts", "run fewer experts, and let vectors compensate for the others", Settings
)
