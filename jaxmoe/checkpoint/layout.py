"""How a layer's experts lie on disk, and both ways between that and `[expert, out, in]`.

A layer's layout is a short list of `Stack`s: one or two projections each, in one tensor per expert or in one for all.
It is all that a writer needs to put dense matrices back under the names and in the form that they came in, so that it
can travel with a factored checkpoint as JSON.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jaxmoe.checkpoint.quantization import Matrix
from jaxmoe.checkpoint.tensor_file import DTYPES, Planned
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, LayerShape


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Tensors that hold one projection, or gate and up together, of all experts of a layer.

    Args:
        name: of the tensor; `{expert}` stands for the number where every expert has its own.
        target: what it holds: `gate`, `up`, `down` or `gate_up`.
        transposed: whether the matrices are `[in, out]`.
        interleaved: whether rows of gate and up alternate.
        flat: whether the experts' rows lie one below the other in a matrix without an expert axis.

    Example:
        >>> stack = Stack(name="mlp.experts.gate_up_proj", target="gate_up", transposed=True)
        >>> stack.on_disk(LayerShape(experts=8, hidden=4, intermediate=3))
        (8, 4, 6)
    """

    name: str
    target: str
    transposed: bool = False
    interleaved: bool = False
    flat: bool = False

    @property
    def per_expert(self) -> bool:
        """Whether every expert has a tensor of its own."""
        return "{expert}" in self.name

    def names(self, shape: LayerShape) -> Iterator[str]:
        """Yield the tensors' names in the order of the experts."""
        if not self.per_expert:
            yield self.name
            return
        for expert in range(shape.experts):
            yield self.name.replace("{expert}", str(expert))

    def on_disk(self, shape: LayerShape) -> tuple[int, ...]:
        """Return the shape of each tensor."""
        experts, out, in_ = shape.of(self.target)
        matrix = (in_, out) if self.transposed else (out, in_)
        if self.per_expert:
            return matrix
        return (experts * matrix[0], matrix[1]) if self.flat else (experts, *matrix)

    def sizes(self, on_disk: tuple[int, ...], experts: int) -> tuple[int, int]:
        """Return `(out, in)` of the matrices from the shape of a tensor; zeros if it cannot be."""
        if len(on_disk) != (2 if self.per_expert or self.flat else 3):
            return 0, 0
        rows, columns = on_disk[-2:]
        if self.flat:
            rows = rows // experts if experts else 0
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self, matrices: Mapping[str, Matrix], shape: LayerShape, projection: str, experts: slice) -> np.ndarray:
        """Read a projection of some experts, `[expert, out, in]`."""
        chosen = range(shape.experts)[experts]
        alone = not self.per_expert and len(TARGETS[self.target]) == 1 and chosen.step == 1
        if alone and len(matrices[self.name].parts) == 1:
            return self._extract(self._some(matrices, shape, chosen), projection)
        out = np.empty((len(chosen), *shape.of(projection)[1:]), DTYPES[matrices[next(self.names(shape))].dtype])
        names = list(self.names(shape)) if self.per_expert else []
        for position, expert in enumerate(chosen):
            # One expert at a time, so that neither what is decoded nor another projection is held beside the result.
            if self.per_expert:
                values = matrices[names[expert]].read()
            else:
                values = self._some(matrices, shape, range(expert, expert + 1))[0]
            out[position] = self._extract(values, projection)
        return out

    def _some(self, matrices: Mapping[str, Matrix], shape: LayerShape, experts: range) -> np.ndarray:
        """Read what one tensor holds of neighbouring experts, `[expert, ...]`."""
        matrix = matrices[self.name]
        rows = matrix.shape[0] // shape.experts if self.flat else 1
        values = matrix.read(slice(experts.start * rows, experts.stop * rows))
        return values.reshape(len(experts), rows, matrix.shape[-1]) if self.flat else values

    def _extract(self, values: np.ndarray, projection: str) -> np.ndarray:
        """Return the view of one projection, `[..., out, in]`, in what a tensor holds."""
        if self.transposed:
            values = values.swapaxes(-1, -2)
        covered = TARGETS[self.target]
        if len(covered) == 1:
            return values
        part = covered.index(projection)
        if self.interleaved:
            return values[..., part :: len(covered), :]
        size = values.shape[-2] // len(covered)
        return values[..., part * size : (part + 1) * size, :]

    def join(self, parts: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
        """Return what a tensor holds from the projections of one expert or of all, `[..., out, in]`."""
        values = parts[0].astype(dtype, copy=False)
        if len(parts) > 1:
            *lead, out, in_ = values.shape
            both = np.empty((*lead, len(parts), out, in_), dtype)
            if self.interleaved:
                both = both.reshape(*lead, out, len(parts), in_).swapaxes(-2, -3)
            for position, part in enumerate(parts):
                both[..., position, :, :] = part
            if self.interleaved:
                both = both.swapaxes(-2, -3)
            values = both.reshape(*lead, len(parts) * out, in_)
        if self.transposed:
            values = values.swapaxes(-1, -2)
        return values.reshape(-1, values.shape[-1]) if self.flat else values


def check_layout(layout: Sequence[Stack], shape: LayerShape) -> None:
    """Raise unless a layout that was read holds each projection of a layer once, under names that can be names.

    Example:
        >>> check_layout([Stack(name="w1", target="up")], LayerShape(experts=2, hidden=4, intermediate=3, gated=False))
        Traceback (most recent call last):
            ...
        jaxmoe.errors.JaxmoeError: the stacks hold up, not each of up, down once
    """
    if unknown := [stack.target for stack in layout if stack.target not in TARGETS]:
        raise JaxmoeError(f"unknown target {unknown[0]!r}: the targets are {', '.join(TARGETS)}")
    held = [projection for stack in layout for projection in TARGETS[stack.target]]
    if sorted(held) != sorted(shape.projections):
        raise JaxmoeError(
            f"the stacks hold {', '.join(held) or 'nothing'}, not each of {', '.join(shape.projections)} once"
        )
    names = [stack.name for stack in layout]
    if wrong := [name for name in names if not name.isprintable() or not name or names.count(name) > 1]:
        raise JaxmoeError(f"{wrong[0]!r} cannot be the name of one tensor")


def plan_dense(
    layout: Sequence[Stack], shape: LayerShape, dtype: np.dtype, produce: Callable[[str], np.ndarray]
) -> list[Planned]:
    """Plan a layer's dense experts under the names and in the form of a layout.

    Args:
        layout: how they lie on disk.
        shape: of the layer.
        dtype: of the tensors on disk.
        produce: returns a projection's matrices, `[expert, out, in]`, in any float dtype. It is called as rarely as the
            order of the tensors allows, and no more than the projections of one stack are held.
    """
    planned = []
    for stack in layout:
        source = _Source(produce, TARGETS[stack.target])
        for expert, name in enumerate(stack.names(shape)):
            index = expert if stack.per_expert else slice(None)
            last = not stack.per_expert or expert == shape.experts - 1
            values = partial(_one_tensor, stack, source, index, dtype, last)
            planned.append(Planned(name, dtype, stack.on_disk(shape), values))
    return planned


class _Source:
    """The projections of one stack, produced when the first of its tensors is written and dropped after the last."""

    def __init__(self, produce: Callable[[str], np.ndarray], projections: tuple[str, ...]):
        self.produce = produce
        self.projections = projections
        self.held: list[np.ndarray] | None = None

    def __call__(self) -> list[np.ndarray]:
        if self.held is None:
            self.held = [np.asarray(self.produce(projection)) for projection in self.projections]
        return self.held


def _one_tensor(stack: Stack, source: _Source, index: int | slice, dtype: np.dtype, last: bool) -> np.ndarray:
    values = stack.join([part[index] for part in source()], dtype)
    if last:
        source.held = None
    return values
