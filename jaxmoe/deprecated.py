"""Public functions of earlier versions: each works once more; `jaxmoe.__getattr__` warns and names what to call now."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmoe.calibration.checkpoint import calibrate
from jaxmoe.calibration.folder import Statistics
from jaxmoe.compression.deprecated import Plan, make_plan
from jaxmoe.compression.deprecated import contender as Contender
from jaxmoe.evaluation import Evaluation, evaluate

__all__ = ["Contender", "Plan", "calibrate_checkpoint", "evaluate_checkpoint", "make_plan"]


def calibrate_checkpoint(
    source: str | Path, texts: Sequence[str | Path], folder: str | Path, **options: Any
) -> Statistics:
    """Call `jaxmoe.calibrate(source, folder, text=texts, ...)`."""
    return calibrate(source, folder, text=texts, **options)


def evaluate_checkpoint(source: str | Path, texts: Sequence[str | Path], **options: Any) -> Evaluation:
    """Call `jaxmoe.evaluate(source, text=texts, ...)`."""
    return evaluate(source, text=texts, **options)
