"""Recovery as a step of a recipe: train what the steps before it stored, towards the model that the recipe began with.

The texts of the calibration are what it learns from, and the teacher is the source; see `jaxmoe.recovery`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxmoe.methods.method import check_setting, no_requirements
from jaxmoe.recovery.losses import loss_weights
from jaxmoe.recovery.training import Training


@dataclass(frozen=True, kw_only=True)
class RecoverySettings(Training):
    """Settings of the training, and what is trained.

    Args:
        setting: "paper" or "improved", which are the same here.
        loss: names of the losses, with weights where these are not 1, such as `distillation,balance=0.01`.
        train: what is trained, names of `recovery.SETS` with commas between them.
        weights: follow from `loss`.

    Example:
        >>> RecoverySettings(loss="distillation,balance=0.01", steps=20).weights
        {'distillation': 1.0, 'balance': 0.01}
    """

    setting: str = "improved"
    loss: str = "distillation"
    train: str = "router,norms,factors"
    weights: Mapping[str, float] = field(init=False, default_factory=dict, hash=False)

    def __post_init__(self):
        check_setting(self.setting)
        object.__setattr__(self, "weights", loss_weights(self.loss))
        super().__post_init__()


class RecoveryMethod(NamedTuple):
    """A method that trains the whole model.

    Args:
        name: as the command line spells it.
        summary: one line for the help text.
        settings: a frozen dataclass that extends `recovery.Training`.
        requires: `(settings) -> {statistic: mend}` as for `Method`.
    """

    name: str
    summary: str
    settings: type
    requires: Any = no_requirements

    kind = "recover"


RECOVER = RecoveryMethod("recover", "train what the steps before it stored", RecoverySettings)
