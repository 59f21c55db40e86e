"""Recovery: training a compressed model, on arrays (`losses`, `training`) and on checkpoints (`recover`)."""

from jaxmoe.recovery.losses import LOSSES, Batch, Side, batch_losses
from jaxmoe.recovery.recover import recover
from jaxmoe.recovery.trainable import SETS, merge, select, split
from jaxmoe.recovery.training import State, Training, begin, train_step

__all__ = [
    "LOSSES",
    "SETS",
    "Batch",
    "Side",
    "State",
    "Training",
    "batch_losses",
    "begin",
    "merge",
    "recover",
    "select",
    "split",
    "train_step",
]
