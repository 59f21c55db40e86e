"""A pass over the layers of a model whose experts are stored as terms: one step after the other works on each layer."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxmoe.checkpoint import Checkpoint, tensor_file
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import Module, experts_modules, factored_config
from jaxmoe.checkpoint.families import architecture
from jaxmoe.compression.budget import NOTHING, Sizes
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.found import Found, Layer, Source
from jaxmoe.compression.layer_errors import measured_errors
from jaxmoe.compression.linear_maps import (
    PlannedLinear,
    describe_linear,
    linear_moment,
    measured_linear,
    read_matrix,
)
from jaxmoe.compression.plan import describe, describe_layers
from jaxmoe.compression.run import OF_A_STEP, Files, Written, run, step_outcomes
from jaxmoe.compression.step import Context, Planned, Setup, Step
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.checking import (
    Answers,
    answers,
    dense_answers,
    first_and_last,
    linear_answers,
    vector_answers,
)
from jaxmoe.export.loading import loads_in
from jaxmoe.export.packed import PACKED, Scheme, beside, digests, packed_config, packed_tensors, schemes
from jaxmoe.export.remote_code import remote_code
from jaxmoe.factors import CompressedLayer, CompressedLinear, Count
from jaxmoe.methods.method import Outcome
from jaxmoe.report.records import Report

_Linears = Sequence[tuple[PlannedLinear, CompressedLinear]]
"""Linear maps of a layer, and what stands for them."""

SETUP = Setup()
EXPORTS = ("factored", "dense")


@dataclass(frozen=True, kw_only=True)
class TermStep(Step):
    """A step that works on terms, or leaves some."""

    hands_on: ClassVar[bool] = True

    def begin(self, planned: Sequence[Planned], found: Found, setup: Setup) -> "TermPass":
        """Return the pass of this step and those that join it.

        Raises:
            JaxmoeError: what they store cannot be written in the form that is asked for.
        """
        work = TermPass(found=found, planned=planned, setup=setup)
        work.packed  # noqa: B018 refused here, before anything runs
        return work


@dataclass(frozen=True, kw_only=True)
class TermPass:
    """Steps that work on the same layers without calibration in between.

    Args:
        found: the model that the first of them works on.
        planned: the steps, in their order.
        setup: what it is carried out with.
    """

    found: Found
    planned: Sequence[Planned]
    setup: Setup = SETUP

    @property
    def export(self) -> str:
        """The form of the result, one of `EXPORTS` or of `export.packed.PACKED`."""
        return self.setup.export or "factored"

    @cached_property
    def packed(self) -> Mapping[int, Scheme]:
        """How the experts of each layer are packed; empty where the form is another."""
        if self.export not in PACKED:
            return {}
        after = self.planned[-1].after
        if after.main is not None or any(after.linears.values()):
            raise JaxmoeError(
                f"--export {self.export} holds quantised matrices of the routed experts, and nothing in place of other"
                " maps or for experts that do not run: write it with --export factored"
            )
        return schemes(after.layers, self.export)

    @property
    def loads_in(self) -> tuple[str, ...]:
        """The programs that will load the result."""
        shapes = [layer.sizes for layer in self.planned[-1].after.layers.values()]
        return loads_in(self.export, self.source.dense_config()["model_type"], {*zip(shapes, self.packed.values())})

    @property
    def seed(self) -> int:
        """The random seed."""
        return self.setup.seed

    @property
    def statistics(self) -> Sums | None:
        """Calibrated on the model, None without."""
        return self.setup.statistics

    @property
    def source(self) -> Source:
        """The checkpoint that is read."""
        return self.found.checkpoint

    @property
    def indices(self) -> list[int]:
        """The layers with routed experts, and those of which a step replaces linear maps."""
        return sorted({*self.found.layers, *self.planned[-1].after.linears})

    @property
    def peak_bytes(self) -> int | None:
        """The largest predicted peak of the steps."""
        return max((own for step in self.planned if (own := step.peak_bytes) is not None), default=None)

    def carry_out(self, output: str | Path, **options: Any) -> Report:
        """Write what comes of it; the options are those of `run`."""
        return run(self, output, **options)

    def identity(self) -> dict[str, Any]:
        """Return what decides the result: that of its step, or of each of them."""
        own = [step.identity(self._context(Path())) for step in self.planned]
        return own[0] if len(own) == 1 else {"steps": own}

    def _context(self, journal: Path) -> Context:
        return Context(self.found, self.setup, journal)

    def layers(self, indices: Sequence[int], journal: Path) -> Iterator[Written]:
        """Hand each layer from step to step."""
        stream = (self._begin(index) for index in indices)
        before = self.found
        for step in self.planned:
            # Layers without routed experts concern steps alone that work on linear maps.
            after = step.after
            through = partial(_with_experts, step) if after.linears is before.linears else step.layers
            stream = map(_counted, through(stream, self._context(journal)))
            before = after
        return map(self._written, stream)

    def _begin(self, index: int) -> Layer:
        if index not in self.found.layers:
            return Layer(index=index, read=None)
        sums = None if self.statistics is None else self.statistics.layer(index)
        read = partial(self.found.read, index)
        return Layer(index=index, sums=sums, read=read, vectors=self.found.compensating(index))

    def _written(self, layer: Layer) -> Written:
        experts = None if layer.read is None else layer.held()
        linears = [(own, layer.linears[own.source.name]) for own in self._linears(layer.index)]
        record = {
            "spec": {} if experts is None else experts.spec(),
            "linears": {own.source.module: stored.spec() for own, stored in linears},
            "stored": layer.count()._asdict(),
            "counts": [count._asdict() for count in layer.counts],
            "projections": self._projections(layer, experts, linears),
            **self._facts(layer.index),
            **self._digests(layer.index, experts),
            **layer.facts,
        }
        written = Written(
            layer.index,
            self._tensors(layer, experts, linears),
            record,
            layer.outcomes,
            self._answers(layer, experts, linears),
        )
        if self.statistics is not None:
            # Before the journal says that the layer is done: a run that resumes finds everything behind it.
            own = {} if experts is None else {"experts": experts}
            self.statistics.follow(
                layer.index, own | {k: x for p, s in linears for k, x in p.source.parameters(s).items()}
            )
        return written

    def _facts(self, index: int) -> dict[str, Any]:
        return {name: value for step in self.planned for name, value in step.facts(index).items()}

    def _linears(self, index: int) -> tuple[PlannedLinear, ...]:
        """Return the linear maps of a layer that steps replace."""
        return self.planned[-1].after.linears.get(index, ())

    def _projections(self, layer: Layer, experts: CompressedLayer | None, linears: _Linears) -> dict[str, Any]:
        """Return what the report says of everything that is stored of a layer."""
        projections = {} if experts is None else describe(experts)
        if experts is not None and (layer.replaced or linears):
            read = self.found.reader(layer)
            for name, record in projections.items():
                record |= measured_errors(read, experts, name, layer.sums, name in layer.replaced)
        for own, stored in linears:
            matrix = read_matrix(self.found.original, own.source)
            moment = linear_moment(self.statistics, own.source, floor=0.0)
            record = {**describe_linear(own.source.name, stored), **measured_linear(matrix, stored, moment)}
            projections[own.source.name] = record
        return projections

    def _tensors(self, layer: Layer, experts: CompressedLayer | None, linears: _Linears) -> list[tensor_file.Planned]:
        if self.packed and experts is not None:
            return packed_tensors(self.found.layer(layer.index), experts)
        if self.export == "dense":
            tensors = []
            if experts is not None:
                source = self.found.layer(layer.index)
                tensors = self.found.original.dense_tensors(source, partial(_materialized, experts))
            return tensors + [
                tensor_file.Planned(
                    own.source.tensor, own.dtype, tuple(own.source.shape), partial(_matrix, own, stored)
                )
                for own, stored in linears
            ]
        arrays = {f"{own.source.module}.{name}": x for own, stored in linears for name, x in stored.tensors().items()}
        if experts is not None:
            module = self.found.modules()[layer.index]
            of_experts = {**experts.tensors(), **layer.vectors}
            arrays = {**{f"{module}.{name}": array for name, array in of_experts.items()}, **arrays}
        return [
            tensor_file.Planned(name, array.dtype, array.shape, partial(np.asarray, array))
            for name, array in arrays.items()
        ]

    def _answers(self, layer: Layer, experts: CompressedLayer | None, linears: _Linears) -> Answers | None:
        """Return what a layer is to answer as exported; a term that masks every batch anew answers otherwise dense.

        Of experts and of linear maps, the first and the last layer that has any is checked.
        """
        found: dict[str, list[float]] = {}
        if experts is not None and layer.index in first_and_last(self.found.layers) and not self.packed:
            if self.export == "dense":
                found |= dense_answers(experts.materialize, experts.sizes)
            else:
                found |= {**answers(experts), **vector_answers(layer.vectors)}
        if layer.index in first_and_last(self.planned[-1].after.linears):
            found |= {own.source.tensor: linear_answers(stored) for own, stored in linears}
        return found or None

    def _digests(self, index: int, experts: CompressedLayer | None) -> dict[str, Any]:
        """Return what a packed layer is to hold to the bit."""
        if experts is None or index not in self.packed or index not in first_and_last(self.packed):
            return {}
        return {"digests": digests(experts, self.found.layer(index).dtype)}

    def sizes(self, entries: Mapping[int, Mapping[str, Any]]) -> Sizes:
        """Return the sizes behind the last step, given what the layers really store: never more than was planned."""
        return self._sizes(entries, len(self.planned) - 1)

    def _sizes(self, entries: Mapping[int, Mapping[str, Any]], position: int) -> Sizes:
        after = self.planned[position].after
        less = NOTHING
        for index, entry in entries.items():
            planned, own = after.count(index), Count(**entry["counts"][position])
            less += Count(own.numbers - planned.numbers, own.bytes - planned.bytes)
        before = replace(self.found, replaced=after.replaced, linears=after.linears).before()
        if self.packed and position == len(self.planned) - 1:
            less += beside(self.found.original, after.layers)
        return Sizes(before, after.after() + less)

    def summary(self, entries: Mapping[int, Mapping[str, Any]] = {}) -> dict[str, Any]:
        """Return the keys of the steps' plans, the sizes behind the last."""
        merged: dict[str, Any] = {}
        for position, step in enumerate(self.planned):
            merged |= step.summary(self._sizes(entries, position))
        peak = {} if self.peak_bytes is None else {"peak_bytes": self.peak_bytes}
        layers = [{**own, **self._facts(own["layer"])} for own in describe_layers(self.planned[-1].after)]
        return {**merged, **peak, "layers": layers}

    def steps(self, entries: Mapping[int, Mapping[str, Any]] = {}) -> list[dict[str, Any]]:
        """Return what is reported of each step; time and outcomes are those of the pass, at its last step."""
        found = []
        for position, step in enumerate(self.planned):
            found.append(
                {name: x for name, x in step.summary(self._sizes(entries, position)).items() if name in OF_A_STEP}
            )
        found[-1] |= step_outcomes(self, entries)
        return found

    def calibration(self) -> dict[str, Any] | None:
        """Return what the report says of the text behind it."""
        if self.statistics is not None:
            return self.statistics.describe()
        context = self._context(Path())
        return next((own for step in self.planned if (own := step.calibration(context)) is not None), None)

    def notes(self) -> list[Outcome]:
        """Return how the source was read, and what a dense export is."""
        notes = [Outcome("note", "", note) for note in (*self.source.notes, *self.planned[-1].after.notes)]
        if self.export == "dense":
            detail = "the files hold the materialised matrices: nothing is saved on disk, the ratios are the factors'"
            notes.insert(0, Outcome("dense_export", "", detail))
        if isinstance(self.source, Checkpoint) and (told := self.source.quantization_note(self.export)):
            notes.append(Outcome("note", "", told))
        return [*notes, *(Outcome("loads_in", "", program) for program in self.loads_in)]

    def files(self, entries: Mapping[int, Mapping[str, Any]]) -> Files:
        """Return the config, the code that runs the terms, and all tensors beside them."""
        after = self.planned[-1].after
        original, copied = self.source.dense_config(), after.copied()
        if self.export == "dense":
            return Files(original, {}, copied, None)
        if self.packed:
            config = packed_config(self.found.original, original, self.packed)
            return Files(config, {}, copied, self.sizes(entries).after.model.bytes)
        paths = self.found.modules()
        described = {paths[i]: (layer.sizes, entries[i]["spec"]) for i, layer in after.layers.items()}
        modules: dict[str, Module] = {**experts_modules(described, self.source.layouts(), after.main)}
        if isinstance(self.source, CompressedCheckpoint):
            modules |= self.source.linears
        for index, linears in after.linears.items():
            modules |= {own.source.module: own.module(entries[index]["linears"][own.source.module]) for own in linears}
        config = factored_config(original, modules)
        config = self.source.with_quantization(config, copied, list(modules))
        return Files(config, remote_code(config), copied, self.sizes(entries).after.model.bytes)


def check_factored(checkpoint: Source, export: str) -> None:
    """Raise if terms of a checkpoint's experts cannot be written in a form, before anything is fitted."""
    if export not in EXPORTS:
        others = "; packed are whole matrices alone: end the recipe with gptq4 or gptq8" if export in PACKED else ""
        raise JaxmoeError(f"export {export!r}: give {' or '.join(EXPORTS)}{others}")
    if isinstance(checkpoint, CompressedCheckpoint):
        if export != "factored":
            raise JaxmoeError(
                f"--export {export}: {checkpoint.folder} is factored already; write it factored, then `jaxmoe convert`"
            )
        return
    if export != "factored":
        return
    architecture(checkpoint.model_type)
    biases = checkpoint.family is not None and checkpoint.family.expert_biases
    if wrong := [layer.index for layer in checkpoint.layers if bool(layer.biases) is not biases]:
        there = "lack their biases" if biases else "have biases, for which their module in transformers has no place"
        raise JaxmoeError(
            f"{checkpoint.folder}: the experts of layers {', '.join(map(str, wrong))} {there}, so that their factors"
            " could not be loaded: mend the checkpoint, or give --export dense"
        )


def _counted(layer: Layer) -> Layer:
    """Return a layer with what it stores behind the step that it comes from."""
    return replace(layer, counts=(*layer.counts, layer.count()))


def _with_experts(step: Planned, layers: Iterator[Layer], context: Context) -> Iterator[Layer]:
    """Let a step work on the layers that have routed experts, and hand on the others as they are, in order."""
    others: deque[Layer] = deque()

    def its_own() -> Iterator[Layer]:
        for layer in layers:
            if layer.read is None:
                others.append(layer)
            else:
                yield layer

    for layer in step.layers(its_own(), context):
        while others and others[0].index < layer.index:
            yield others.popleft()
        yield layer
    yield from others


def _matrix(planned: PlannedLinear, stored: CompressedLinear) -> np.ndarray:
    return np.asarray(stored.materialize()).astype(planned.dtype)


def _materialized(layer: CompressedLayer, projection: str) -> np.ndarray:
    return np.asarray(layer.materialize(projection))
