"""Chains: one method after another under one budget, such as `reap+mobe`.

All steps but the last remove experts or channels, so that each hands a checkpoint of the original architecture to the
next. What the chain is to keep is shared in factors: with a kept fraction g of the experts, step i is asked to keep
g^(s_i / (s_1 + s_2 + ...)) of what it finds, with shares s_i of one unless others are given. Whole experts and channels
come in coarse pieces, of which the nearest number is kept; the last step makes up for that and spends what is left of
the budget exactly. Every step is calibrated on what it finds.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoe import methods
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.atomic import remove
from jaxmoe.checkpoint.output import MEND, PARTIAL, output_folder
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.workspace import fingerprint, finished
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.plan import SCOPES
from jaxmoe.compression.pruned_sizes import SlimPlan, make_slim_plan, unwritten
from jaxmoe.compression.recipe import carry_out, check_form, plan_compression
from jaxmoe.compression.run import reads, where
from jaxmoe.errors import JaxmoeError, StorageError
from jaxmoe.methods import AnyMethod, PruningMethod
from jaxmoe.methods.method import needs_gradients
from jaxmoe.report.events import Complete, OnEvent, ignore, without_complete
from jaxmoe.texts import Windows

_STEP = re.compile(rf"\d+-\w+-[0-9a-f]{{8}}({re.escape(PARTIAL)})?")
PREFIX = "prune:"
"""May stand before a chain, for the reader."""
STEPS = ".steps"
"""What the name of the folder of the steps in between ends in."""


class Chain(NamedTuple):
    """Methods in the order in which they run; `name` is how the command line spells it.

    Example:
        >>> find("prune:reap+mobe").name
        'reap+mobe'
    """

    name: str
    steps: tuple[AnyMethod, ...]

    @property
    def slimming(self) -> tuple[PruningMethod, ...]:
        """All steps but the last."""
        return tuple(step for step in self.steps[:-1] if isinstance(step, PruningMethod))

    def requires(self, settings: "ChainSettings") -> Mapping[str, str]:
        """Return the statistics that its steps need, as for `Method`."""
        own = [step.requires(chosen) for step, chosen in zip(self.steps, settings.steps)]
        return {name: mend for needs in own for name, mend in needs.items()}

    @property
    def allocation(self) -> str:
        """That of the last step."""
        return self.steps[-1].allocation


@dataclass(frozen=True, kw_only=True)
class ChainSettings:
    """The settings of a chain's steps, all with the same `setting`.

    Args:
        setting: "paper" or "improved".
        steps: an instance of every step's own settings.
        shares: how much each step removes beside the others, as an exponent of what the chain keeps; None for equal
            shares.

    Raises:
        JaxmoeError: shares that are not one positive number for each step.
    """

    setting: str
    steps: tuple[Any, ...]
    shares: tuple[float, ...] | None = None

    def __post_init__(self):
        shares = self.shares
        if shares is not None and (len(shares) != len(self.steps) or not all(0 < s < math.inf for s in shares)):
            raise JaxmoeError(f"shares {shares} of {len(self.steps)} steps: give each step a positive number")

    def share(self, position: int) -> float:
        """Return the fraction of the whole removal, in factors, that falls to a step."""
        shares = self.shares or (1.0,) * len(self.steps)
        return shares[position] / sum(shares)


def find(name: str) -> AnyMethod | Chain:
    """Return the method of that name, or the chain that it spells.

    Raises:
        JaxmoeError: a step is unknown, or one that is not the last does not remove experts or channels.
    """
    steps = [methods.get(part) for part in name.removeprefix(PREFIX).split("+")]
    if len(steps) == 1:
        return steps[0]
    if wrong := [step.name for step in steps[:-1] if not isinstance(step, PruningMethod)]:
        raise JaxmoeError(
            f"{name}: {', '.join(wrong)} stores factors, on which no further step can work; let it be the last one,"
            f" after methods that remove experts or channels: {methods.pruning_methods()}"
        )
    return Chain("+".join(step.name for step in steps), tuple(steps))


def plan_chain(
    checkpoint: Checkpoint,
    chain: Chain,
    settings: ChainSettings,
    *,
    ratio: float,
    of: str = "experts",
    weighted: bool = False,
) -> dict[str, Any]:
    """Return what a chain will store, before anything runs: the keys of other plans, and the `steps`.

    Args:
        checkpoint: the source.
        chain: the methods.
        settings: theirs.
        ratio: removed fraction, by all steps together.
        of: what it is a fraction of, one of `plan.SCOPES`.
        weighted: whether the last step will be calibrated.

    Raises:
        JaxmoeError: the ratio is out of a step's reach.
    """
    budget = _Budget(checkpoint, chain, ratio, of)
    steps, found = [], checkpoint
    for position, method in enumerate(chain.slimming):
        plan = budget.slim(found, method, settings, position)
        steps.append(plan.summary())
        found = unwritten(found, plan)
    rest = budget.rest(found)
    steps.append(plan_compression(found, chain.steps[-1], settings.steps[-1], ratio=rest, weighted=weighted).summary())
    last = steps[-1]
    return {
        **last,
        **budget.describe(settings),
        **budget.sizes(checkpoint, found, last),
        "peak_bytes": max(step["peak_bytes"] for step in steps),
        "steps": [{name: step[name] for name in _OF_A_STEP if name in step} for step in steps],
    }


def compress_chain(
    checkpoint: Checkpoint,
    output: str | Path,
    chain: Chain,
    settings: ChainSettings,
    *,
    ratio: float,
    of: str = "experts",
    texts: Sequence[Windows],
    tokenizer: str | None,
    gradients: str | None = None,
    statistics: Sums | None = None,
    allocation: str | None = None,
    export: str | None = None,
    seed: int = 0,
    resume: bool = True,
    command: str = "",
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Carry out a chain and write the compressed checkpoint.

    Args:
        checkpoint: the source.
        output: the folder to create; the steps in between lie in `OUTPUT.steps` beside it, until it is complete.
        chain: the methods.
        settings: theirs.
        ratio: removed fraction, by all steps together.
        of: what it is a fraction of.
        texts: to calibrate every step on.
        tokenizer: fingerprint of what cut them.
        gradients: whether and how the last step's calibration keeps the Fisher information; None for what it needs.
        statistics: of the source on these texts, where they are known already.
        allocation: of the last step.
        export: of the last step.
        seed: of everything random.
        resume: whether to go on with an unfinished run.
        command: the command line, for the report.
        on_event: called with a small record after every layer.

    Returns:
        The report: that of the last step, with the sizes of the whole chain and all `steps`.

    Raises:
        JaxmoeError: the ratio is out of reach, the output exists, or a step fails.
    """
    output = output_folder(output, [checkpoint.folder, *reads(statistics)], beside=(PARTIAL, STEPS))
    begun = time.perf_counter()
    budget = _Budget(checkpoint, chain, ratio, of)
    check_form(checkpoint, chain.steps[-1], export=export)
    if needs_gradients(chain.requires(settings)):
        gradients = gradients or "sequence"
    run = {
        "source": checkpoint.fingerprint(),
        **budget.describe(settings),
        "texts": [[text.name, text.fingerprint, list(text.ids.shape)] for text in texts],
        "gradients": gradients,
        "allocation": allocation,
        "export": export,
        "seed": seed,
        **where(),
    }
    if (done := finished(output, run)) is not None:
        on_event(Complete(output=str(output)))
        return done
    plan_chain(checkpoint, chain, settings, ratio=ratio, of=of, weighted=True)
    folder = output.with_name(output.name + STEPS)
    # Steps of another run must not pass for this one's: their names carry what made them.
    mark = fingerprint(run)[:8]
    check_steps(folder)
    if not resume:
        remove_steps(folder)
    found, reports, known = checkpoint, [], statistics
    for number, method in enumerate(chain.slimming, start=1):
        if known is None:
            known = _calibrated(found, texts, folder / f"{number}-statistics-{mark}", tokenizer, None, on_event)
        plan = budget.slim(found, method, settings, number - 1)
        step = folder / f"{number}-{method.name}-{mark}"
        report = carry_out(found, step, plan, statistics=known, on_event=without_complete(on_event))
        reports.append({name: report[name] for name in _OF_A_STEP if name in report})
        found, known = Checkpoint.open(step, ignore_config_keys=checkpoint.ignored), None
    known = _calibrated(found, texts, folder / f"{len(chain.steps)}-statistics-{mark}", tokenizer, gradients, on_event)
    rest = budget.rest(found)
    plan = plan_compression(
        found, chain.steps[-1], settings.steps[-1], ratio=rest, allocation=allocation, statistics=known
    )

    detail = "errors of the matrices are the last step's, against what the steps before it left"
    last = {"layer": None, "kind": "note", "target": None, "detail": detail}

    def whole(report: dict[str, Any]) -> dict[str, Any]:
        """Turn the report of the last step into that of the chain."""
        return {
            **report,
            **budget.describe(settings),
            **budget.sizes(checkpoint, found, report),
            "source": str(checkpoint.folder),
            "outcomes": [*(outcome for step in reports for outcome in step["outcomes"]), *report["outcomes"], last],
            "steps": [*reports, {name: report[name] for name in _OF_A_STEP if name in report}],
            "layer_seconds": sum(step["layer_seconds"] for step in reports) + report["layer_seconds"],
            "seconds": time.perf_counter() - begun,
            "run": run,
        }

    options = {"seed": seed, "resume": resume, "command": command, "statistics": known}
    report = carry_out(found, output, plan, export=export, amend=whole, on_event=on_event, **options)
    remove_steps(folder)
    return report


def check_steps(folder: Path) -> None:
    """Raise if what is in the place of a chain's steps is no folder of its own."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = "link" if folder.is_symlink() else "file"
        raise StorageError(
            f"{folder} is a {kind}, and the steps of a chain lie in a folder there: remove it, or {MEND}"
        )


def remove_steps(folder: Path) -> None:
    """Remove the steps of this chain and of earlier ones, and the folder unless it holds something else."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if _STEP.fullmatch(path.name):
                remove(path)
        with suppress(OSError):
            folder.rmdir()


_OF_A_STEP = ("method", "settings", "requested", "achieved", "kept", "parameters", "bytes", "outcomes", "layer_seconds")
"""What the report of a chain says of every step."""


class _Budget:
    """What a chain removes in all, in numbers, and what of it falls to a step."""

    def __init__(self, checkpoint: Checkpoint, chain: Chain, ratio: float, of: str):
        if of not in SCOPES:
            raise JaxmoeError(f"of {of!r}: give {', '.join(SCOPES)}")
        if not 0 < ratio < 1:
            raise JaxmoeError(f"ratio {ratio} is not a removed fraction: give a number between 0 and 1, such as 0.4")
        self.chain, self.ratio, self.of = chain, ratio, of
        self.experts, self.parameters = _experts(checkpoint), checkpoint.parameters
        scope = self.parameters if of == "model" else self.experts
        self.removed = math.ceil(Fraction(str(ratio)) * scope)
        if self.removed >= self.experts:
            raise JaxmoeError(f"ratio {ratio} of {of} is more than all routed experts: choose a smaller one")

    def slim(self, found: Checkpoint, method: PruningMethod, settings: ChainSettings, position: int) -> SlimPlan:
        """Plan a step but the last on what it finds."""
        ratio = 1 - (1 - self.removed / self.experts) ** settings.share(position)
        return make_slim_plan(found, method, settings.steps[position], ratio=ratio, nearest=True)

    def rest(self, found: Checkpoint) -> float:
        """Return the fraction of the experts that it finds that the last step removes."""
        experts = _experts(found)
        gone = self.parameters - found.parameters if self.of == "model" else self.experts - experts
        if gone >= self.removed:
            *first, last = (step.name for step in self.chain.steps)
            raise JaxmoeError(
                f"{'+'.join(first)} cannot remove so little of this model that anything is left for {last} at ratio"
                f" {self.ratio} of {self.of}: choose a larger ratio, or one of them alone"
            )
        # Rounded up, so that the plan never keeps a number too many.
        return math.nextafter((self.removed - gone) / experts, 1)

    def sizes(self, checkpoint: Checkpoint, found: Checkpoint, last: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sizes of the whole chain from those of its last step; every other one touches all experts."""
        stored = round(_experts(found) * (1 - last["achieved"]["experts"]))
        after = {name: last[name]["after"] for name in ("parameters", "bytes")}
        removed = 1 - stored / self.experts
        return {
            "achieved": {"touched": removed, "experts": removed, "model": 1 - after["parameters"] / self.parameters},
            "parameters": {"before": checkpoint.parameters, "after": after["parameters"]},
            "bytes": {"before": checkpoint.bytes, "after": after["bytes"]},
        }

    def describe(self, settings: ChainSettings) -> dict[str, Any]:
        """Return what the report says was asked for."""
        own: dict[str, Any] = {step.name: asdict(chosen) for step, chosen in zip(self.chain.steps, settings.steps)}
        if settings.shares is not None:
            for name, share in zip(own, settings.shares):
                own[name]["share"] = share
        requested = {"ratio": self.ratio, "of": self.of}
        return {"method": self.chain.name, "settings": own, "requested": requested}


def _experts(checkpoint: Checkpoint) -> int:
    return sum(layer.shape.numbers for layer in checkpoint.layers)


def _calibrated(found: Checkpoint, texts, folder: Path, tokenizer: str | None, gradients: str | None, on_event) -> Sums:
    model = StoredModel(found.folder, ignore_config_keys=found.ignored)
    return calibrate_windows(model, texts, folder, tokenizer=tokenizer, gradients=gradients, on_event=on_event).check(
        found
    )
