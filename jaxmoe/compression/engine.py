"""Plan and carry out recipes on opened checkpoints: pass after pass, each calibrated on what it finds.

A recipe of one pass writes its output at once. The results of the passes in between lie in `OUTPUT.steps` beside the
output, under names that carry what made them, until it is complete: a run that was stopped finds them there.
"""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.calibration.folder import Statistics
from jaxmoe.calibration.sequential import Sequential
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.atomic import remove
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import is_factored
from jaxmoe.checkpoint.files import read_config
from jaxmoe.checkpoint.output import MEND, PARTIAL, output_folder
from jaxmoe.checkpoint.workspace import JOURNAL, fingerprint, finished
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.found import Found, Source
from jaxmoe.compression.recipe import Recipe
from jaxmoe.compression.recipe_file import NAME, recorded
from jaxmoe.compression.run import environment
from jaxmoe.compression.spending import Spending
from jaxmoe.compression.step import Asked, Options, Setup, Step, Texts
from jaxmoe.compression.whole import Whole, whole_sizes
from jaxmoe.errors import JaxmoeError, StorageError
from jaxmoe.report.events import Complete, OnEvent, ignore, without_complete
from jaxmoe.report.records import PlanSummary, Report

_STEP = re.compile(rf"\d+-[\w+]+-[0-9a-f]{{8}}({re.escape(PARTIAL)})?")
STEPS = ".steps"
"""What the name of the folder of the passes in between ends in."""


def plan(
    checkpoint: Source,
    recipe: Recipe,
    asked: Asked,
    *,
    options: Options = Options(),  # noqa: B008
    statistics: Sums | None = None,
    weighted: bool = False,
    measure: bool = True,
) -> PlanSummary:
    """Return what a recipe will store, before anything runs.

    Args:
        checkpoint: the source.
        recipe: the steps.
        asked: the sizes, from `Recipe.asked`.
        options: how it is to be carried out; of these the rule of allocation decides sizes.
        statistics: calibrated statistics of the source, for recipes of one pass.
        weighted: whether there will be some.
        measure: whether what sizes cost may be measured on the checkpoint; without that, sizes alone count.

    Raises:
        JaxmoeError: a size is out of reach, or a step does not take what it is given.
    """
    checkpoint = keeping(checkpoint, recipe, options.export)
    found = Found.of(checkpoint)
    spending = Spending(recipe, asked, found.before())
    summary, works = {}, []
    for number, steps in enumerate(recipe.passes(texts=False)):
        # What the passes before will write has no values yet.
        readable = measure and number == 0
        planned = spending.plan(steps, found, options, statistics, weighted=weighted, measure=readable)
        works.append(steps[0].begin(planned, found, Setup(export=options.export, statistics=statistics)))
        new = works[-1].summary({})
        # A training has sizes, and leaves everything else as it was.
        summary = new if "layers" in new else summary | new
        found = planned[-1].after
    if len(recipe.steps) > 1:
        summary |= _about(recipe, spending)
        summary |= whole_sizes(spending.before, works[-1].sizes({}), spending.requested())
        summary["peak_bytes"] = max((own for work in works if (own := work.peak_bytes) is not None), default=None)
        summary["steps"] = [step for work in works for step in work.steps({})]
    loads = next((list(own) for work in reversed(works) if (own := work.loads_in)), None)
    return PlanSummary.read({"peak_bytes": None, **summary, "exports": recipe.forms(checkpoint), "loads_in": loads})


def compress(
    checkpoint: Source,
    output: str | Path,
    recipe: Recipe,
    asked: Asked,
    *,
    options: Options = Options(),  # noqa: B008
    texts: Texts | None = None,
    statistics: Sums | None = None,
    seed: int = 0,
    resume: bool = True,
    command: str = "",
    on_event: OnEvent = ignore,
) -> Report:
    """Carry out a recipe and write the compressed checkpoint.

    Args:
        checkpoint: the source, which is never written to.
        output: the folder to create; work in progress lies in `OUTPUT.partial` beside it, the passes in between in
            `OUTPUT.steps`, the statistics of a single pass in `OUTPUT.statistics`.
        recipe: the steps.
        asked: the sizes, from `Recipe.asked`.
        options: how it is to be carried out.
        texts: to calibrate on, and to learn from.
        statistics: of the source, where they are known already; for a recipe of several passes those of `texts`.
        seed: the random seed.
        resume: whether to resume an unfinished run; False starts over.
        command: the command line, for the report.
        on_event: called with a small record after every layer.

    Returns:
        The report, also written to `report.json`; its `complete` is False while layers of other runs are missing.

    Raises:
        JaxmoeError: the recipe cannot be carried out like that, a ratio is out of reach, the output exists, or a step
            fails.
    """
    options = options._replace(texts=texts is not None, statistics=statistics is not None)
    checkpoint = keeping(checkpoint, recipe, options.export)
    recipe.check(checkpoint, options)
    passes = recipe.passes(options.texts)
    reads = [checkpoint.folder, *(() if statistics is None else statistics.reads)]
    output = output_folder(output, reads, beside=(PARTIAL, STEPS) if len(passes) > 1 else (PARTIAL,))
    work = _Work(checkpoint, output, recipe, asked, options, texts, statistics, seed, resume, command, on_event)
    return work.once(statistics) if len(passes) == 1 else work.passes(passes, statistics)


class _Work:
    """One call of `compress`: what its passes share."""

    def __init__(
        self,
        checkpoint: Source,
        output: Path,
        recipe: Recipe,
        asked: Asked,
        options: Options,
        texts: Texts | None,
        statistics: Sums | None,
        seed: int,
        resume: bool,
        command: str,
        on_event: OnEvent,
    ):
        self.checkpoint, self.output, self.recipe, self.options = checkpoint, output, recipe, options
        self.texts, self.given, self.seed, self.resume = texts, statistics, seed, resume
        self.command, self.on_event = command, on_event
        self.found = Found.of(checkpoint)
        self.spending = Spending(recipe, asked, self.found.before())
        self.begun = time.perf_counter()

    def once(self, statistics: Sums | None) -> Report:
        """Carry out a recipe whose steps share one pass."""
        (steps,) = self.recipe.passes(self.options.texts)
        calibrates = self.texts is not None and statistics is None and _calibrates(steps)
        if calibrates:
            # An impossible size is refused before hours of calibration, not after.
            self.spending.plan(steps, self.found, self.options, None, weighted=True, measure=False)
            statistics = self._sequential() if self.options.sequential else self._calibrated_once(steps)
        whole = self._whole(None, []) if len(steps) > 1 else None
        return self._pass(steps, self.found, statistics, self.output, whole, self.on_event)

    def _pass(
        self,
        steps: Sequence[Step],
        found: Found,
        statistics: Sums | None,
        output: Path,
        whole: Whole | None,
        on_event: OnEvent,
        *,
        last: bool = True,
    ) -> Report:
        """Plan and carry out some steps on what they find."""
        for step in steps:
            check_statistics(step, statistics)
        options = self.options if last else self.options._replace(export=None, allocation=None)
        planned = self.spending.plan(steps, found, options, statistics, weighted=False)
        setup = Setup(options.export, self.seed, statistics, self.texts, self.checkpoint.folder)
        return (
            steps[0]
            .begin(planned, found, setup)
            .carry_out(
                output,
                layers=options.layers,
                resume=self.resume or not last,
                command=self.command if last else "",
                files={NAME: self._recipe_file()} if last else {},
                whole=whole,
                on_event=on_event,
            )
        )

    def _recipe_file(self) -> str:
        """Return the recipe file that makes the output again."""
        chosen = {"options": self.options, "statistics": self.given, "texts": self.texts, "seed": self.seed}
        return recorded(
            self.recipe,
            self.spending.asked,
            ignored=self.checkpoint.ignored,
            family=self.checkpoint.family,
            **chosen,
        )

    def _whole(self, identity: Mapping[str, Any] | None, reports: Sequence[Mapping[str, Any]]) -> Whole:
        return Whole(
            identity=identity,
            source=self.checkpoint.folder,
            summary=_about(self.recipe, self.spending),
            before=self.spending.before,
            reports=reports,
            begun=self.begun,
        )

    def passes(self, passes: Sequence[Sequence[Step]], statistics: Sums | None) -> Report:
        """Carry out one pass after the other, each on what the one before wrote."""
        texts = self.texts.windows if self.texts is not None else ()
        gradients = {
            number: self._gradients(steps, number == _last_layered(passes)) for number, steps in enumerate(passes)
        }
        identity = {
            "source": self.checkpoint.fingerprint(),
            **_about(self.recipe, self.spending),
            "texts": [[text.name, text.fingerprint, list(text.ids.shape)] for text in texts],
            "gradients": gradients[_last_layered(passes)],
            "allocation": self.options.allocation,
            "export": self.options.export,
            "seed": self.seed,
            **environment(),
        }
        if (done := finished(self.output, identity)) is not None:
            self.on_event(Complete(output=str(self.output)))
            return Report.read(done)
        weighted = self.texts is not None
        plan(
            self.checkpoint,
            self.recipe,
            self.spending.asked,
            options=self.options,
            weighted=weighted,
            measure=False,
        )
        folder = self.output.with_name(self.output.name + STEPS)
        # Steps of another run must not pass for this one's: their names carry what made them.
        mark = fingerprint(identity)[:8]
        check_steps(folder)
        if not self.resume:
            remove_steps(folder)
        reports, found = [], self.found
        for number, steps in enumerate(passes, start=1):
            last = number == len(passes)
            if statistics is None and self.texts is not None and _calibrates(steps):
                own = folder / f"{number}-statistics-{mark}"
                statistics = self._calibrated(found, own, gradients[number - 1])
            output = self.output if last else folder / f"{number}-{'+'.join(step.name for step in steps)}-{mark}"
            whole = self._whole(identity, reports) if last else self._whole(None, [])
            on_event = self.on_event if last else without_complete(self.on_event)
            report = self._pass(steps, found, statistics, output, whole, on_event, last=last)
            if last:
                remove_steps(folder)
                return report
            reports.append(report.as_json())
            found, statistics = Found.of(self._opened(output)), None
        raise AssertionError("a recipe has passes")

    def _opened(self, folder: Path) -> Source:
        """Open what a pass wrote."""
        ignored = self.checkpoint.ignored
        if is_factored(read_config(folder)):
            return CompressedCheckpoint.open(folder, ignore_config_keys=ignored)
        return keeping(Checkpoint.open(folder, ignore_config_keys=ignored), self.recipe, self.options.export)

    def _gradients(self, steps: Sequence[Step], last: bool) -> str | None:
        """Return whether and how the calibration of a pass keeps the Fisher information."""
        needed = any(step.needs_gradients for step in steps)
        return (self.options.gradients if last else None) or ("sequence" if needed else None)

    def _calibrated(self, found: Found, folder: Path, gradients: str | None) -> Statistics:
        assert self.texts is not None
        options = {"tokenizer": self.texts.tokenizer, "gradients": gradients, "on_event": self.on_event}
        options["targets"] = self.options.targets
        return calibrate_windows(found.model(), self.texts.windows, folder, **options).check(found.checkpoint)

    def _calibrated_once(self, steps: Sequence[Step]) -> Statistics:
        folder = self.output.with_name(f"{self.output.name}.statistics")
        assert self.texts is not None
        folder = output_folder(folder, [self.checkpoint.folder, *self.texts.paths])
        return self._calibrated(self.found, folder, self._gradients(steps, last=True))

    def _sequential(self) -> Sequential:
        assert self.texts is not None
        # In the journal of the unfinished output, which goes when that is published.
        folder = self.output.with_name(self.output.name + PARTIAL) / JOURNAL / "states"
        options = {"tokenizer": self.texts.tokenizer, "targets": self.options.targets}
        return Sequential(self.found.model(), self.texts.windows, folder, **options)


def keeping(checkpoint: Source, recipe: Recipe, form: str | None) -> Source:
    """Return a checkpoint whose quantised matrices stay as they are where no step replaces them and the form allows it.

    Args:
        checkpoint: an original, or what a recipe wrote, in which they stay anyway.
        recipe: the steps.
        form: of its result; None for its own.
    """
    return checkpoint.keeping(form or recipe.form) if isinstance(checkpoint, Checkpoint) else checkpoint


def _about(recipe: Recipe, spending: Spending) -> dict[str, Any]:
    """Return what plans and reports say of a recipe."""
    return {"method": recipe.name, "settings": recipe.settings, "requested": spending.requested()}


def _calibrates(steps: Sequence[Step]) -> bool:
    """Tell whether steps use statistics of the model that they find."""
    return any("statistics" in step.accepts for step in steps)


def _last_layered(passes: Sequence[Sequence[Step]]) -> int:
    """Return the number of the last pass that uses statistics."""
    return max((number for number, steps in enumerate(passes) if _calibrates(steps)), default=0)


def check_statistics(step: Step, statistics: Sums | None) -> None:
    """Raise if a step needs what the statistics did not keep.

    Args:
        step: one that works on layers.
        statistics: None where there are none.
    """
    keeps = frozenset() if statistics is None else statistics.keeps
    if missing := {name: mend for name, mend in step.requires.items() if name not in keeps}:
        mends = "; ".join(dict.fromkeys(missing.values()))
        have = "there are no statistics" if statistics is None else f"the statistics lack {', '.join(missing)}"
        raise JaxmoeError(f"{step.name} with these settings cannot run: {have}; {mends}")


def check_steps(folder: Path) -> None:
    """Raise if what is in the place of a recipe's passes in between is no folder of its own."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = "link" if folder.is_symlink() else "file"
        raise StorageError(
            f"{folder} is a {kind}, and the steps of a recipe lie in a folder there: remove it, or {MEND}"
        )


def remove_steps(folder: Path) -> None:
    """Remove the passes in between of this recipe and earlier ones, and the folder unless it holds something else."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if _STEP.fullmatch(path.name):
                remove(path)
        with suppress(OSError):
            folder.rmdir()
