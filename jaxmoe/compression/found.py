"""The model that a step of a recipe finds, and one layer of it on its way through the steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.checkpoint import Checkpoint, MoELayer, tensor_file
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import layer_index
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.compression.budget import NOTHING, Totals, disk_counts
from jaxmoe.compression.evidence import LayerSums
from jaxmoe.compression.linear_maps import PlannedLinear
from jaxmoe.factors import TARGETS, CompressedLayer, CompressedLinear, Count, Dense, LayerShape, Term, stack
from jaxmoe.methods.method import Outcome
from jaxmoe.model.compressed_experts import MainExperts, vector_shapes

Source = Checkpoint | CompressedCheckpoint
"""What a recipe may be carried out on: an original, or what a recipe wrote."""


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
        own = self.layer(index)
        terms: dict[str, tuple[Term, ...]] = {
            name: (Dense(weight=self.checkpoint.projection(own, name)),) for name in own.shape.projections
        }
        return CompressedLayer(terms=terms, sizes=own.shape)

    def reader(self, layer: "Layer") -> Callable[[str], Any]:
        """Return what reads the matrices of a layer's projections as the checkpoint has them."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            assert layer.read is not None
            return layer.read().materialize
        return partial(self.checkpoint.projection, self.layer(layer.index))

    def compensating(self, index: int) -> dict[str, Any]:
        """Return the vectors of a layer that compensate for experts, as the checkpoint stores them."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            return self.checkpoint.auxiliary(self.modules()[index])
        return {}

    def layer(self, index: int) -> MoELayer:
        """Return a layer of the checkpoint, for steps that work on whole matrices."""
        return next(own for own in self.original.layers if own.index == index)

    def vectors(self) -> Count:
        """Count the vectors that compensate for experts, were some not to run: float32."""
        numbers = sum(rows * size for own in self.layers.values() for rows, size in vector_shapes(own.sizes).values())
        return Count(numbers, 4 * numbers)

    def copied(self) -> list[tensor_file.Planned]:
        """Plan every tensor that no step replaces, byte for byte."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            return [*self.checkpoint.copied(), *self.checkpoint.linear_tensors()]
        linears = [own for linears in self.linears.values() for own in linears]
        return self.checkpoint.copied(but=[own.source.tensor for own in linears])

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


def matrices(read: Callable[[str], Any], target: str) -> jax.Array:
    """Return the matrices of a target in float32, `[expert, out, in]`.

    Args:
        read: returns those of a projection.
        target: one projection, or several stacked along their outputs.
    """
    return stack({name: jnp.asarray(read(name), jnp.float32) for name in TARGETS[target]}, target)


def dense_layer(shape: LayerShape, dtype: Any) -> CompressedLayer:
    """Return the experts of a layer as they are in an original, abstract.

    Example:
        >>> dense_layer(LayerShape(experts=2, hidden=4, intermediate=3), "float32").count().numbers
        72
    """
    terms: dict[str, tuple[Term, ...]] = {name: (Dense.abstract(shape.of(name), dtype),) for name in shape.projections}
    return CompressedLayer(terms=terms, sizes=shape)


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
