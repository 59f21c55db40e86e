"""Make the checkpoint of a cell: what its kind of method needs of the common calibration, and the run itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.comparison.cells import Cell
from jaxmoe.compression.chain import Chain, compress_chain
from jaxmoe.compression.fewer_experts import compress_experts
from jaxmoe.compression.fewer_experts_plan import make_main_plan
from jaxmoe.compression.recipe import carry_out, plan_compression
from jaxmoe.compression.run import check_statistics
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.compressed_experts import MainMethod
from jaxmoe.model.auxiliary import MainExperts
from jaxmoe.report.events import OnEvent
from jaxmoe.texts import Windows


class Texts(NamedTuple):
    """The texts of the calibration, as they were given and as they were cut.

    Args:
        paths: as given.
        sequences: windows of each, None for all.
        length: tokens in a window.
        windows: the windows.
        tokenizer: fingerprint of what cut them.
    """

    paths: Sequence[str]
    sequences: int | None
    length: int
    windows: Sequence[Windows]
    tokenizer: str | None

    def options(self) -> list[str]:
        """Return what the command line is to be told of them."""
        words = [word for path in self.paths for word in ("--text", path)]
        words += ["--sequences", str(self.sequences)] if self.sequences is not None else []
        return [*words, "--length", str(self.length)]


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
        if isinstance(cell.contender.method, MainMethod):
            return self.texts.options()
        if isinstance(cell.contender.method, Chain):
            return [*self.texts.options(), *(["--gradients", "sequence"] if self.gradients else [])]
        return ["--statistics", str(self.statistics.folder)]

    def make(self, cell: Cell, output: Path, command: str) -> dict[str, Any]:
        """Write the checkpoint of a cell and return the report.

        Raises:
            JaxmoeError: the size cannot be reached, the calibration is missing, or the run fails.
        """
        method, settings = cell.contender.method, cell.contender.settings
        shared: dict[str, Any] = {"seed": cell.seed, "command": command, "on_event": self.on_event}
        calibrated = self.texts if self.statistics is not None else None
        if isinstance(method, MainMethod):
            plan = make_main_plan(self.model, MainExperts(cell.size["main_experts"], settings.renorm))
            learned = {} if calibrated is None else {"texts": calibrated.windows, "tokenizer": calibrated.tokenizer}
            return compress_experts(plan, output, settings, **learned, **shared)
        if isinstance(method, Chain):
            if calibrated is None:
                raise JaxmoeError(f"{method.name}: every step is calibrated on what it finds; give --calibration-text")
            return compress_chain(
                self.checkpoint,
                output,
                method,
                settings,
                **cell.size,
                texts=calibrated.windows,
                tokenizer=calibrated.tokenizer,
                gradients="sequence" if self.gradients else None,
                statistics=self.statistics,
                **shared,
            )
        plan = plan_compression(self.checkpoint, method, settings, **cell.size, statistics=self.statistics)
        check_statistics(plan, self.statistics)
        return carry_out(self.checkpoint, output, plan, statistics=self.statistics, **shared)
