"""Recovering: the whole model is trained on text, once the steps before it have stored what they store."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from jaxmoe.checkpoint.families import exports
from jaxmoe.checkpoint.records import read_record
from jaxmoe.checkpoint.workspace import REPORT
from jaxmoe.compression.budget import Sizes
from jaxmoe.compression.found import Found, Source
from jaxmoe.compression.run import OF_A_STEP
from jaxmoe.compression.step import Asked, Options, Setup, Step
from jaxmoe.compression.whole import Whole
from jaxmoe.errors import JaxmoeError
from jaxmoe.recovery.losses import TAUGHT
from jaxmoe.recovery.recover import Completes, recover
from jaxmoe.recovery.training import Training
from jaxmoe.report.events import OnEvent, ignore
from jaxmoe.report.records import Report


@dataclass(frozen=True, kw_only=True)
class Recover(Step):
    """A step that trains what is stored."""

    stage: ClassVar[int] = 4
    stores: ClassVar[str] = "same"

    @property
    def calibration(self) -> str:
        """Text is what it learns from."""
        return "required"

    def forms(self, checkpoint: Source) -> list[str]:
        """Return the forms of what is trained, which it leaves as they are."""
        return exports(checkpoint.dense_config()["model_type"])

    def check(self, checkpoint: Source, options: Options) -> None:
        """Raise if there is nothing to learn from."""
        if not options.texts:
            raise JaxmoeError(f"{self.name}: it learns from text; give --text")

    def plan(self, found: Found, asked: Asked, **_: Any) -> "PlannedRecover":
        """Return the plan: no size changes."""
        return PlannedRecover(step=self, found=found)

    def begin(self, planned: Sequence["PlannedRecover"], found: Found, setup: Setup) -> "RecoverPass":
        """Return the pass, of which it is the only step."""
        return RecoverPass(planned=planned[0], setup=setup)


@dataclass(frozen=True, kw_only=True)
class PlannedRecover:
    """A training, planned.

    Args:
        step: what is planned.
        found: the model that is trained.
    """

    step: Recover
    found: Found = field(repr=False)

    @property
    def after(self) -> Found:
        """The same model, with other numbers."""
        return self.found

    @property
    def peak_bytes(self) -> None:
        """Unknown: the whole model, its teacher and the optimiser's memory are held at once."""

    def summary(self, sizes: Sizes) -> dict[str, Any]:
        """Return the plan as JSON."""
        return {
            "method": self.step.name,
            "settings": asdict(self.step.settings),
            "requested": {},
            "achieved": sizes.removed(),
            **sizes.model(),
        }


@dataclass(frozen=True, kw_only=True)
class RecoverPass:
    """The training of a whole model as a pass of a recipe.

    Args:
        planned: the step.
        setup: what it is carried out with.
    """

    planned: PlannedRecover
    setup: Setup

    @property
    def peak_bytes(self) -> None:
        """Unknown."""

    @property
    def loads_in(self) -> tuple[str, ...]:
        """Nothing new: the programs that load what is trained."""
        return ()

    def summary(self, entries: Any = None) -> dict[str, Any]:
        """Return the keys of the plan."""
        return self.planned.summary(self.sizes())

    def steps(self, entries: Any = None) -> list[dict[str, Any]]:
        """Return what is reported of the step."""
        return [{name: value for name, value in self.summary().items() if name in OF_A_STEP}]

    def sizes(self, entries: Any = None) -> Sizes:
        """Return the sizes, which stay."""
        return Sizes(self.planned.found.before(), self.planned.found.after())

    def carry_out(
        self,
        output: Path,
        *,
        whole: Whole,
        layers: tuple[int, int] | None = None,
        resume: bool = True,
        command: str = "",
        files: Mapping[str, str] | None = None,
        on_event: OnEvent = ignore,
    ) -> Report:
        """Train the model and write the result.

        Args:
            output: the folder to create.
            whole: the recipe.
            layers: none: it works on all of them at once.
            resume: whether to resume an unfinished run.
            command: the command line, for the report.
            files: further text files of the output, by name.
            on_event: called after every update.
        """
        settings, source, texts = self.planned.step.settings, self.planned.found.checkpoint, self.setup.texts
        assert texts is not None
        # What is trained is the work of the step before, whose report says how it came about.
        record = read_record(source.folder / REPORT, dict[str, Any], "start over with --no-resume")
        before = {name: value for name, value in record.items() if name not in ("run", "seal", "stored")}
        own = {"outcomes": [], "layer_seconds": 0.0, "command": command, "output": str(output), "seed": self.setup.seed}
        note = "errors of the matrices are from before the training"
        recover(
            source.folder,
            output,
            text=texts.paths,
            teacher=self.setup.teacher if settings.weights.keys() & {*TAUGHT} else None,
            train=settings.train.split(","),
            loss=settings.weights,
            length=texts.length,
            seed=self.setup.seed,
            resume=resume,
            command=command,
            ignore_config_keys=source.ignored,
            completes=Completes(whole.report({**before, **own}, self.sizes(), self.steps(), note), files or {}),
            on_event=on_event,
            **{own.name: getattr(settings, own.name) for own in fields(Training) if own.name != "weights"},
        )
        return Report.read(read_record(output / REPORT, dict[str, Any], "start over with --no-resume"))
