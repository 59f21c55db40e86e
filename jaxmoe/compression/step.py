"""What every step of a recipe has in common, whatever its kind: what it needs, where it may stand, how it works.

A step is a method with its settings. Planned on what it finds, it knows the size of everything it will store; carried
out, it takes the layers of a pass one after the other, as the step before it leaves them, and hands them on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxmoe import methods
from jaxmoe.checkpoint import Checkpoint, MoELayer, tensor_file
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import layer_index
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.compression.budget import NOTHING, Budget, Sizes, Totals, disk_counts
from jaxmoe.compression.evidence import LayerSums, Sums
from jaxmoe.compression.linear_maps import PlannedLinear
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, CompressedLayer, CompressedLinear, Count, Dense, LayerShape, Term
from jaxmoe.methods.method import Outcome
from jaxmoe.model.compressed_experts import MainExperts, vector_shapes
from jaxmoe.texts import Windows

Source = Checkpoint | CompressedCheckpoint
"""What a recipe may be carried out on: an original, or what a recipe wrote."""


class Texts(NamedTuple):
    """The texts of a calibration, as they were given and as they were cut.

    Args:
        paths: as given.
        sequences: windows of each, None for all.
        length: tokens in a window.
        windows: the windows.
        tokenizer: fingerprint of what cut them.
    """

    paths: Sequence[str | Path]
    sequences: int | None
    length: int
    windows: Sequence[Windows]
    tokenizer: str | None


class Asked(NamedTuple):
    """The sizes that a recipe is asked for; None where it takes no such size.

    Args:
        budget: what is removed.
        main_experts: how many of a token's experts run.
    """

    budget: Budget | None = None
    main_experts: int | None = None


EXPERTS = ("experts",)
"""The targets of every step that is told no others."""


class Options(NamedTuple):
    """How a recipe is to be carried out, beside its sizes: what some steps refuse.

    Args:
        export: form of the result; None for the recipe's own.
        layers: `(first, end)`, to work on these layers alone.
        sequential: whether each layer is calibrated behind the compressed ones.
        allocation: rule by which the budget is shared; None for the method's own.
        targets: what factors replace: "experts", and of the linear maps beside them `model.roles.LINEAR_TARGETS`.
        gradients: whether and how the calibration keeps the Fisher information; None for what is needed.
        texts: whether there are texts to calibrate on.
        statistics: whether there are statistics.
    """

    export: str | None = None
    layers: tuple[int, int] | None = None
    sequential: bool = False
    allocation: str | None = None
    targets: tuple[str, ...] = EXPERTS
    gradients: str | None = None
    texts: bool = False
    statistics: bool = False

    def given(self) -> list[str]:
        """Return the names of what not every step takes and was given.

        Example:
            >>> Options(layers=(0, 2), statistics=True).given()
            ['layers', 'statistics']
        """
        names = ("layers", "sequential", "allocation", "gradients", "statistics")
        return [name for name in names if getattr(self, name) not in (None, False)]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The model that a step finds: a checkpoint, and what steps before it in the same pass store of its layers.

    Args:
        checkpoint: where the numbers come from; one that is still to be written has none.
        layers: what the experts of each layer store, abstract, by the layer's index.
        main: the experts that run, where vectors compensate for the others.
        replaced: the projections of each layer that steps so far replaced.
        linears: the linear maps beside them that steps so far replaced, by layer.
        notes: what a user should know of what they do, one sentence each.
    """

    checkpoint: Source
    layers: Mapping[int, CompressedLayer] = field(repr=False)
    main: MainExperts | None = None
    replaced: Mapping[int, frozenset[str]] = field(default_factory=dict)
    linears: Mapping[int, tuple[PlannedLinear, ...]] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Source) -> "Found":
        """Return what a checkpoint is to its first step."""
        if isinstance(checkpoint, CompressedCheckpoint):
            layers = {layer_index(module): checkpoint.abstract_layer(module) for module in checkpoint.modules}
            return cls(checkpoint=checkpoint, layers=layers, main=next(iter(checkpoint.main.values()), None))
        layers = {layer.index: dense_layer(layer.shape, layer.dtype) for layer in checkpoint.layers}
        return cls(checkpoint=checkpoint, layers=layers)

    @property
    def original(self) -> Checkpoint:
        """The checkpoint, for steps that work on whole matrices."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            raise RuntimeError("the order of the steps was not checked: a defect of jaxmoe")
        return self.checkpoint

    def model(self) -> StoredModel:
        """Return the checkpoint as something that runs."""
        return StoredModel(self.checkpoint.folder, ignore_config_keys=self.checkpoint.ignored)

    def modules(self) -> dict[int, str]:
        """Return the paths of the experts' modules, by layer."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            return {layer_index(module): module for module in self.checkpoint.modules}
        return {layer.index: layer.module for layer in self.checkpoint.layers}

    def read(self, index: int) -> CompressedLayer:
        """Return the experts of a layer as the checkpoint stores them."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            return self.checkpoint.layer(self.modules()[index])
        own = self._layer(index)
        terms: dict[str, tuple[Term, ...]] = {
            name: (Dense(weight=self.checkpoint.projection(own, name)),) for name in own.shape.projections
        }
        return CompressedLayer(terms=terms, sizes=own.shape)

    def reader(self, layer: "Layer") -> Callable[[str], Any]:
        """Return what reads the matrices of a layer's projections as the checkpoint has them."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            assert layer.read is not None
            return layer.read().materialize
        return partial(self.checkpoint.projection, self._layer(layer.index))

    def compensating(self, index: int) -> dict[str, Any]:
        """Return the vectors of a layer that compensate for experts, as the checkpoint stores them."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            return self.checkpoint.auxiliary(self.modules()[index])
        return {}

    def _layer(self, index: int) -> MoELayer:
        return next(own for own in self.original.layers if own.index == index)

    def vectors(self) -> Count:
        """Count the vectors that compensate for experts, were some not to run: float32."""
        numbers = sum(rows * size for own in self.layers.values() for rows, size in vector_shapes(own.sizes).values())
        return Count(numbers, 4 * numbers)

    def copied(self) -> list[tensor_file.Planned]:
        """Plan every tensor that no step replaces, byte for byte."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            return [*self.checkpoint.copied(), *self.checkpoint.linear_tensors()]
        copied = self.checkpoint.copied()
        if not self.linears:
            return copied
        replaced = {own.source.tensor for linears in self.linears.values() for own in linears}
        return [planned for planned in copied if planned.name not in replaced]

    def count(self, index: int) -> Count:
        """Count what is stored of a layer."""
        experts = self.layers[index].count() if index in self.layers else NOTHING
        return sum((own.template.count() for own in self.linears.get(index, ())), experts)

    def linear_count(self) -> Count:
        """Count what is stored of the linear maps that were replaced."""
        return sum((own.template.count() for linears in self.linears.values() for own in linears), NOTHING)

    def before(self) -> Totals:
        """Count the three scopes as they lie on disk."""
        checkpoint = self.checkpoint
        model = Count(checkpoint.parameters, checkpoint.bytes)
        if isinstance(checkpoint, CompressedCheckpoint):
            return Totals(checkpoint.count(), checkpoint.count(), model)
        counts = {layer.index: disk_counts(checkpoint, layer) for layer in checkpoint.layers}
        touched = [count for index, own in counts.items() for name, count in own.items() if name in self.touched(index)]
        touched += [own.before(checkpoint) for linears in self.linears.values() for own in linears]
        experts = [count for own in counts.values() for count in own.values()]
        return Totals(sum(touched, NOTHING), sum(experts, NOTHING), model)

    def after(self) -> Totals:
        """Count the three scopes as they will lie on disk."""
        stored = sum((layer.count() for layer in self.layers.values()), self.vectors() if self.main else NOTHING)
        kept = NOTHING
        for index, layer in self.layers.items():
            for target, terms in layer.terms.items():
                if not {*TARGETS[target]} & self.touched(index):
                    kept = sum((term.count() for term in terms), kept)
        copied, linears = self.copied(), self.linear_count()
        rest = Count(sum(planned.numbers for planned in copied), sum(planned.bytes for planned in copied))
        touched = Count(stored.numbers - kept.numbers, stored.bytes - kept.bytes) + linears
        return Totals(touched, stored, stored + linears + rest)

    def touched(self, index: int) -> frozenset[str]:
        """Return the projections of a layer that the ratio of what is replaced is about: all where none is replaced."""
        return self.replaced[index] if self.replaced else frozenset(self.layers[index].sizes.projections)


def dense_layer(shape: LayerShape, dtype: Any) -> CompressedLayer:
    """Return the experts of a layer as they are in an original, abstract.

    Example:
        >>> dense_layer(LayerShape(experts=2, hidden=4, intermediate=3), "float32").count().numbers
        72
    """
    terms: dict[str, tuple[Term, ...]] = {name: (Dense.abstract(shape.of(name), dtype),) for name in shape.projections}
    return CompressedLayer(terms=terms, sizes=shape)


class Setup(NamedTuple):
    """What a pass is carried out with, beside its steps.

    Args:
        export: form of the result; None for the steps' own.
        seed: the random seed.
        statistics: calibrated on the model that it finds, None without.
        texts: to learn from, None without.
        teacher: folder of the model that the recipe began with.
    """

    export: str | None = None
    seed: int = 0
    statistics: Sums | None = None
    texts: Texts | None = None
    teacher: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer on its way through the steps of a pass.

    Args:
        index: of the layer.
        read: returns its experts as the source stores them; None where it has none.
        sums: what calibration says of it, None without.
        experts: what they are so far; None as long as no step has worked on them.
        vectors: that compensate for experts, by name.
        replaced: projections whose matrices are no longer those of the source.
        linears: what stands for linear maps beside them, by the maps' names.
        outcomes: what the user should know.
        facts: what the steps have to say of it, as JSON.
        counts: what it stored behind every step so far.
    """

    index: int
    read: Callable[[], CompressedLayer] | None
    sums: LayerSums | None = None
    experts: CompressedLayer | None = None
    vectors: Mapping[str, Any] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()
    linears: Mapping[str, CompressedLinear] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    counts: tuple[Count, ...] = ()

    def held(self) -> CompressedLayer:
        """Return the experts as they are now."""
        if self.experts is not None:
            return self.experts
        if self.read is None:
            raise RuntimeError(f"layer {self.index} has no routed experts: a defect of jaxmoe")
        return self.read()

    def count(self) -> Count:
        """Count what is stored of it."""
        experts = NOTHING if self.read is None else self.held().count()
        return sum((own.count() for own in self.linears.values()), experts)


class Context(NamedTuple):
    """What the steps of a pass work with.

    Args:
        found: the model that the pass finds.
        setup: what it is carried out with.
        journal: folder for what a step keeps while it works; it goes when the output is published.
    """

    found: Found
    setup: Setup
    journal: Path


@runtime_checkable
class Planned(Protocol):
    """A step that works on the layers of a pass, planned: what it will store, and how it comes about."""

    @property
    def after(self) -> Found:
        """The model that it leaves."""
        ...

    @property
    def peak_bytes(self) -> int | None:
        """Predicted peak of memory beyond that of the idle program; None where nothing predicts it."""
        ...

    def summary(self, sizes: Sizes) -> dict[str, Any]:
        """Return the plan as JSON, with the keys that other programs read.

        Args:
            sizes: of all three scopes, as planned or as they came true.
        """
        ...

    def identity(self, context: Context) -> dict[str, Any]:
        """Return what decides the bytes of its result, as JSON, beside what all steps share."""
        ...

    def calibration(self, context: Context) -> dict[str, Any] | None:
        """Return what the report says of the text that it learns from, None where it is not the statistics' text."""
        ...

    def layers(self, layers: Iterator[Layer], context: Context) -> Iterator[Layer]:
        """Work on layers in their order, each as the step before leaves it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """A method with its settings.

    Args:
        method: its record in `jaxmoe.methods`.
        settings: an instance of `method.settings`.
    """

    method: Any
    settings: Any

    stage: ClassVar[int]
    """Where its kind stands in the usual order: remove, factor, quantise, skip, recover."""
    takes: ClassVar[str | None] = None
    """The size that it is asked for: "ratio", "main_experts", or none."""
    whole: ClassVar[bool] = False
    """Whether it works on whole matrices alone, not on what another step stored in their place."""
    stores: ClassVar[str] = "factored"
    """The form in which it leaves the model: "factored", "slim" (fewer or smaller experts), or "same"."""
    accepts: ClassVar[frozenset[str]] = frozenset()
    """Names of the `Options.given` that it takes."""
    without_text: ClassVar[str] = "it does not learn from text"
    """Why it takes none, where its calibration is "none"."""
    once: ClassVar[bool] = False
    """Whether one step of its kind is all that makes sense."""
    hands_on: ClassVar[bool] = False
    """Whether a step after it may work on its layers in the same pass."""

    @property
    def name(self) -> str:
        """That of the method."""
        return self.method.name

    @property
    def requires(self) -> Mapping[str, str]:
        """The statistics without which it cannot run, and what the user can do instead."""
        return self.method.requires(self.settings)

    @property
    def calibration(self) -> str:
        """Whether it uses text: "none", "optional" or "required"."""
        return "required" if self.requires else "optional"

    @property
    def allocation(self) -> str:
        """The rule by which it shares its budget where the statistics allow it."""
        return "uniform"

    def joins(self, texts: bool) -> bool:
        """Tell whether it works in the same pass as the step before it: where it needs no calibration in between."""
        return False

    def forms(self, checkpoint: Source) -> list[str]:
        """Return the forms in which a recipe that ends with it can be written, its own first."""
        raise NotImplementedError

    def check(self, checkpoint: Source, options: Options) -> None:
        """Raise if it cannot be carried out like that on a checkpoint, before anything runs."""

    def check_targets(self, checkpoint: Source, targets: tuple[str, ...]) -> None:
        """Raise if it cannot replace anything but routed experts, or the checkpoint has nothing of a target.

        Args:
            checkpoint: the source.
            targets: others than the routed experts alone.
        """
        able = ", ".join(methods.of_linear_maps())
        raise JaxmoeError(f"--targets {','.join(targets)}: {self.name} works on the experts alone; others take {able}")

    def terms(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Return what becomes of the abstract terms of a target."""
        return terms

    def adds(self, found: Found) -> Count:
        """Count what it stores beside the terms."""
        return NOTHING

    def plan(
        self,
        found: Found,
        asked: Asked,
        *,
        options: Options,
        statistics: Sums | None,
        weighted: bool,
        then: Sequence["Step"],
        nearest: bool = False,
    ) -> Any:
        """Plan the step.

        Args:
            found: the model that it works on.
            asked: the sizes that fall to it.
            options: how it is to be carried out.
            statistics: of that model, None where there are none (yet).
            weighted: whether there will be some.
            then: the steps after it, which decide what its terms take in the end.
            nearest: whether it may remove a little less where that is closer, since a later step makes up for it.
        """
        raise NotImplementedError

    def begin(self, planned: Sequence[Any], found: Found, setup: Setup) -> Any:
        """Return the pass that this step begins.

        Args:
            planned: the step and those that join it, planned.
            found: the model that it finds.
            setup: what it is carried out with.
        """
        raise NotImplementedError


def behind(then: Sequence[Step], terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Return what becomes of the abstract terms of a target in the steps that follow."""
    for step in then:
        terms = step.terms(terms)
    return terms
