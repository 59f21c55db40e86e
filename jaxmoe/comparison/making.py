"""Make the checkpoint of a cell: what its kind of method needs of the common calibration, and the run itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.comparison.cells import Cell
from jaxmoe.compression.engine import compress
from jaxmoe.compression.step import Options, Texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.report.events import OnEvent


@dataclass(frozen=True)
class Making:
    """What all cells are made from.

    Args:
        checkpoint: the source.
        model: the same, as something that runs.
        statistics: of the calibration; None for a contender that takes none.
        texts: behind them.
        gradients: whether the contender uses their Fisher information.
        on_event: called after every step.
    """

    checkpoint: Checkpoint
    model: StoredModel
    statistics: Statistics | None
    texts: Texts | None
    gradients: bool
    on_event: OnEvent

    def options(self, cell: Cell) -> list[str]:
        """Return the options by which the command line gives a cell its calibration and what all cells share."""
        ignored = self.checkpoint.ignored
        return [*self._calibration(cell), *(["--ignore-config-keys", ",".join(ignored)] if ignored else [])]

    def _calibration(self, cell: Cell) -> list[str]:
        if self.statistics is None or self.texts is None:
            return []
        if not cell.contender.learns_from_text:
            return ["--statistics", str(self.statistics.folder)]
        gradients = (
            ["--gradients", self._gradients] if self._gradients and cell.contender.recipe.accepts("gradients") else []
        )
        return [*_told(self.texts), *gradients]

    @property
    def _gradients(self) -> str | None:
        return "sequence" if self.gradients else None

    def make(self, cell: Cell, output: Path, command: str) -> dict[str, Any]:
        """Write the checkpoint of a cell and return the report.

        Raises:
            JaxmoeError: the size cannot be reached, the calibration is missing, or the run fails.
        """
        recipe, texts = cell.contender.recipe, None
        if cell.contender.learns_from_text and self.statistics is not None:
            texts = self.texts
        if texts is None and len(recipe.passes(texts=True)) > 1 and recipe.calibration == "required":
            raise JaxmoeError(f"{recipe.name}: every step is calibrated on what it finds; give --calibration-text")
        gradients = self._gradients if texts is not None and recipe.accepts("gradients") else None
        report = compress(
            self.checkpoint,
            output,
            recipe,
            recipe.asked(**cell.size),
            options=Options(gradients=gradients),
            texts=texts,
            statistics=self.statistics if recipe.accepts("statistics") else None,
            seed=cell.seed,
            command=command,
            on_event=self.on_event,
        )
        return report.as_json()


def _told(texts: Texts) -> list[str]:
    """Return what the command line is to be told of some texts."""
    words = [word for path in texts.paths for word in ("--text", str(path))]
    words += ["--sequences", str(texts.sequences)] if texts.sequences is not None else []
    return [*words, "--length", str(texts.length)]
