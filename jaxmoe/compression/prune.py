"""Removing: whole experts or channels go, and what stays is a checkpoint of the original architecture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxmoe.checkpoint import Checkpoint, MoELayer
from jaxmoe.checkpoint.layout import plan_dense
from jaxmoe.checkpoint.tensor_file import Planned
from jaxmoe.compression.budget import Sizes
from jaxmoe.compression.evidence import LayerSums, Sums, evidence
from jaxmoe.compression.found import Found, Source
from jaxmoe.compression.layer_errors import measured_errors
from jaxmoe.compression.prune_plan import PrunePlan, make_prune_plan, unwritten
from jaxmoe.compression.run import OF_A_STEP, Files, Written, run, step_outcomes
from jaxmoe.compression.step import Asked, Options, Setup, Step
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.checking import dense_answers, first_and_last
from jaxmoe.export.loading import loads_in
from jaxmoe.export.pruned import slim_config, slim_copied, slim_edited
from jaxmoe.factors import CompressedLayer, Dense
from jaxmoe.factors.slicing import slice_channels
from jaxmoe.methods.method import Outcome
from jaxmoe.methods.pruning import Pruned
from jaxmoe.report.records import Report


@dataclass(frozen=True, kw_only=True)
class Prune(Step):
    """A step that removes experts or channels."""

    stage: ClassVar[int] = 0
    whole: ClassVar[bool] = True
    stores: ClassVar[str] = "slim"
    # Some of these only to say why not.
    accepts: ClassVar[frozenset[str]] = frozenset({"layers", "sequential", "allocation", "gradients", "statistics"})

    @property
    def takes(self) -> str:
        """The removed fraction."""
        return "ratio"

    def forms(self, checkpoint: Source) -> list[str]:
        """Return the one form that it writes."""
        return ["slim"]

    def check(self, checkpoint: Source, options: Options) -> None:
        """Raise if it is to work on some layers alone, or otherwise than it can."""
        if options.layers is not None or options.sequential or options.export not in (None, "slim"):
            raise JaxmoeError(
                f"{self.name} goes through all layers at once and writes a checkpoint of the original architecture:"
                " leave out --layers, --sequential and --export"
            )

    def plan(
        self,
        found: Found,
        asked: Asked,
        *,
        options: Options,
        then: Sequence[Step] = (),
        nearest: bool = False,
        **_: Any,
    ) -> "PrunePass":
        """Choose how many experts or channels stay."""
        if options.allocation not in (None, "uniform"):
            raise JaxmoeError(f"--allocation {options.allocation}: {self.name} keeps the same number in every layer")
        assert asked.budget is not None
        plan = make_prune_plan(found.original, self.method, self.settings, asked.budget, nearest=nearest, then=then)
        return PrunePass(found=found, plan=plan)

    def begin(self, planned: Sequence["PrunePass"], found: Found, setup: Setup) -> "PrunePass":
        """Return the pass, of which it is the only step."""
        return replace(planned[0], statistics=setup.statistics)


@dataclass(frozen=True, kw_only=True)
class PrunePass:
    """A pass over the layers that leaves fewer or smaller experts.

    Args:
        found: the model.
        plan: how many stay.
        statistics: calibrated on the model; all pruning methods so far need some.
    """

    found: Found = field(repr=False)
    plan: PrunePlan
    statistics: Sums | None = None

    @property
    def export(self) -> str:
        """The one form that there is."""
        return "slim"

    @property
    def seed(self) -> int:
        """Nothing is random."""
        return 0

    @property
    def source(self) -> Checkpoint:
        """The checkpoint that is read."""
        return self.found.original

    @property
    def indices(self) -> list[int]:
        """The layers with routed experts."""
        return [layer.index for layer in self.source.layers]

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of memory."""
        return self.plan.peak_bytes

    @property
    def loads_in(self) -> tuple[str, ...]:
        """The programs that will load the result."""
        return loads_in(self.export, self.source.model_type)

    @property
    def after(self) -> Found:
        """The model that it leaves: all names and sizes, but no values."""
        return Found.of(unwritten(self.source, self.plan))

    def carry_out(self, output: str | Path, **options: Any) -> Report:
        """Write what comes of it; the options are those of `run`."""
        return run(self, output, **options)

    def identity(self) -> dict[str, Any]:
        """Return what decides the result."""
        plan = self.plan
        return {
            "method": plan.method.name,
            "settings": asdict(plan.settings),
            "requested": plan.requested,
            "kept": {plan.method.unit: plan.keep},
        }

    def layers(self, indices: Sequence[int], journal: Path) -> Iterator[Written]:
        """Write the layers with their routers and biases, one after the other."""
        copied = slim_copied(self.source)
        for layer in self.source.layers:
            if layer.index in indices:
                sums = None if self.statistics is None else self.statistics.layer(layer.index)
                yield _pruned(self.source, self.plan, layer, copied, sums)

    def summary(self, entries: Mapping[int, Mapping[str, Any]] = {}) -> dict[str, Any]:
        """Return the keys of the plan."""
        return self.plan.summary()

    def steps(self, entries: Mapping[int, Mapping[str, Any]] = {}) -> list[dict[str, Any]]:
        """Return what is reported of the step."""
        own = {name: value for name, value in self.summary().items() if name in OF_A_STEP}
        return [{**own, **step_outcomes(self, entries)}]

    def sizes(self, entries: Mapping[int, Mapping[str, Any]] = {}) -> Sizes:
        """Return the sizes."""
        return self.plan.sizes

    def calibration(self) -> dict[str, Any] | None:
        """Return what the report says of the text behind the statistics."""
        return None if self.statistics is None else self.statistics.describe()

    def notes(self) -> list[Outcome]:
        """Return how the source was read, and what is left out."""
        source = self.source
        notes = [note for note in source.notes if "multi-token prediction" not in note]
        if source.mtp:
            notes.append(
                f"{len(source.mtp)} tensors of multi-token prediction are left out, and their layers set to 0 in"
                " config.json: they have as many experts as the model had"
            )
        if told := self.source.quantization_note(self.export):
            notes.append(told)
        programs = [Outcome("loads_in", "", program) for program in self.loads_in]
        return [*(Outcome("note", "", note) for note in notes), *programs]

    def files(self, entries: Mapping[int, Mapping[str, Any]]) -> Files:
        """Return the config and all tensors that no layer edits."""
        edited = {name for entry in entries.values() for name in entry["edited"]}
        copied = [tensor for tensor in slim_copied(self.source) if tensor.name not in edited]
        config = slim_config(self.source, self.plan.method.unit, self.plan.keep)
        config = self.source.with_quantization(config, copied, [layer.module for layer in self.source.layers])
        return Files(config, {}, copied, self.plan.sizes.after.model.bytes)


def _pruned(
    checkpoint: Checkpoint, plan: PrunePlan, layer: MoELayer, copied: Sequence[Planned], sums: LayerSums | None
) -> Written:
    """Remove what goes of one layer, and plan its tensors with those of its router and biases."""
    unit = plan.method.unit
    read = partial(checkpoint.projection, layer)
    known = evidence(sums, "down", lambda name: read(name).astype(np.float32))
    found: Pruned = plan.method.fit(known, plan.keep, plan.settings, groups=plan.groups)
    _check(found, plan, layer)
    edited = slim_edited(checkpoint, layer, copied, unit, plan.keep, lambda: found.kept)
    rest = partial(_remaining, read, found, unit)
    tensors = plan_dense(layer.written, plan.shapes[layer.index], layer.dtype, rest)
    tensors += [tensor for new in edited.values() for tensor in new]
    projections = plan.projections(layer.index)
    for name, record in projections.items():
        # The original's sizes, with zeros for what is gone.
        padded = CompressedLayer(
            terms={name: (Dense(weight=_padded(rest(name), found.kept, layer.shape.of(name), name, unit)),)},
            sizes=layer.shape,
        )
        record |= measured_errors(read, padded, name, sums)
    checked = layer.index in first_and_last(own.index for own in checkpoint.layers)
    record = {
        **({"kept": found.kept.tolist()} if unit == "experts" else {}),
        "edited": sorted(edited),
        "projections": projections,
    }
    outcomes = [*_never_routed(sums), *found.outcomes]
    answers = dense_answers(rest, plan.shapes[layer.index]) if checked else None
    return Written(layer.index, tensors, record, outcomes, answers)


def _check(found: Pruned, plan: PrunePlan, layer: MoELayer) -> None:
    """Raise unless a method kept just so many, and gave numbers."""
    lead = () if plan.method.unit == "experts" else (layer.shape.experts,)
    if found.kept.shape != (*lead, plan.keep) or (np.diff(found.kept, axis=-1) <= 0).any():
        raise RuntimeError(f"layer {layer.index}: {plan.method.name} kept {found.kept.shape}, not {plan.keep} in order")
    for name, weight in found.weights.items():
        if not np.isfinite(weight).all():
            raise JaxmoeError(
                f"layer {layer.index}, {name}: {plan.method.name} gave weights that are not finite; calibrate with more"
                " text, or try another setting"
            )


def _remaining(read, found: Pruned, unit: str, projection: str) -> np.ndarray:
    """Return a projection of what stays."""
    if projection in found.weights:
        return found.weights[projection]
    weight = read(projection)
    return weight[found.kept] if unit == "experts" else slice_channels(weight, found.kept, projection)


def _padded(weight: np.ndarray, kept: np.ndarray, shape: tuple[int, ...], projection: str, unit: str) -> np.ndarray:
    whole = np.zeros(shape, np.float32)
    if unit == "experts":
        whole[kept] = weight
    else:
        index = kept[:, None, :] if projection == "down" else kept[:, :, None]
        np.put_along_axis(whole, index, weight.astype(np.float32), axis=2 if projection == "down" else 1)
    return whole


def _never_routed(sums: LayerSums | None) -> list[Outcome]:
    never = [] if sums is None else np.flatnonzero(np.asarray(sums.counts) == 0).tolist()
    if not never:
        return []
    detail = f"no calibration token chose experts {', '.join(map(str, never))}: they count for nothing"
    return [Outcome("never_routed", "", detail)]
