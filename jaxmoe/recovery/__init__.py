"""Recovery: training a compressed model, on arrays (`losses`, `training`).

Training of checkpoints is in `recovery.recover`, which reads and writes files and is not imported here.
"""

from jaxmoe.recovery.losses import LOSSES, Batch, Side, batch_losses
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
    "select",
    "split",
    "train_step",
]
