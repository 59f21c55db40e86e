"""The sums of one batch in one layer, as a pure function of what the layer's experts saw and did.

Assignments of tokens to experts are sorted into blocks of one expert each (`model.blocked`), and a loop over the blocks
adds up products in float32 at the highest precision; the caller adds batches up in float64. The second moments of some
of the experts can be asked for alone, where those of all would not fit into memory.

A second moment is symmetric: on CPU its rows are cut into panels of which only what lies on or above the diagonal is
multiplied, down to 9/16 of the work; the rest is mirrored once in the end. Other platforms multiply everything in one
product, since they would wait for many small ones.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.calibration.statistics import FIELDS
from jaxmoe.factors import LayerShape
from jaxmoe.factors.leaves import pytree
from jaxmoe.model.blocked import BlockShape, arrange, most_blocks, summed_rows
from jaxmoe.model.layer import Intermediates


@pytree(static=("shape", "names", "experts", "inputs"))
@dataclass(frozen=True, kw_only=True)
class Summing:
    """What to sum, as a function that is a pytree: all that differ in `first` alone share a compiled program.

    Args:
        shape: of the layer's routed experts, None where it has none.
        names: of their arrays to sum, from `FIELDS`.
        first: the first expert whose rows are returned.
        experts: how many experts' rows are returned.
        inputs: the activations whose second moments to sum, see `inputs.py`.

    Example:
        >>> import jax
        >>> jax.tree.leaves(Summing(shape=LayerShape(4, 8, 6), names=("counts",), experts=2, first=2))
        [2]
    """

    shape: LayerShape | None
    names: tuple[str, ...]
    experts: int
    first: int = 0
    inputs: tuple[str, ...] = ()

    def __call__(self, seen: Intermediates, counted: Bool[Array, "sequence position"]) -> dict[str, Array]:
        """Return the sums of a batch by name, in float32 and int32; of per-expert ones only the chosen rows."""
        counted = counted.reshape(-1)
        inputs = {name: gram(jnp.where(counted[:, None], seen.reads[name], 0)) for name in self.inputs}
        return self._of_experts(seen, counted) | inputs

    def _of_experts(self, seen: Intermediates, counted) -> dict[str, Array]:
        if self.shape is None:
            return {}
        assert seen.routes is not None
        sums = {}
        if {*POOLED} & {*self.names}:
            hits = jnp.any(seen.routes.experts[:, :, None] == jnp.arange(self.shape.experts), 1) & counted[:, None]
            # Whole numbers below 2^24 are exact.
            sums["coactivation"] = gram(hits.astype(jnp.float32)).astype(jnp.int32)
            sums["input_moment"] = gram(jnp.where(counted[:, None], seen.inputs, 0))
        if any(name not in sums for name in self.names):
            sums |= self._by_expert(seen, counted, self.shape)
        return {name: sums[name] for name in self.names}

    def _by_expert(self, seen: Intermediates, counted, shape: LayerShape) -> dict[str, Array]:
        assert seen.routes is not None
        chosen, weights = seen.routes
        local = chosen - self.first
        mine = counted[:, None] & (local >= 0) & (local < self.experts)
        # What is not asked for goes to one expert more, behind the blocks that the loop visits.
        local = jnp.where(mine, local, self.experts)
        largest = max(shape.hidden, shape.intermediate) ** 2
        rows = summed_rows(chosen.size, self.experts, largest)
        blocks = arrange(local, self.experts + 1, BlockShape(rows, most_blocks(chosen.size, self.experts + 1, rows)))
        used = jnp.sum(blocks.expert < self.experts)
        names = [name for name in self.names if name not in POOLED]
        start = {
            name: jnp.zeros(
                (self.experts, *FIELDS[name].shape(shape)[1:]), jnp.int32 if name == "counts" else jnp.float32
            )
            for name in names
        }

        def add(index, sums):
            assignment, expert = blocks.assignment[index], blocks.expert[index]
            real = (assignment < chosen.size)[:, None]
            token = jnp.minimum(assignment // chosen.shape[1], len(chosen) - 1)
            place = jnp.minimum(assignment, chosen.size - 1)
            row = _Rows(
                real=real.astype(jnp.int32),
                inputs=jnp.where(real, seen.inputs[token], 0),
                weights=jnp.where(real, weights.reshape(-1)[place][:, None], 0),
                intermediate=jnp.where(real, _flat(seen.intermediate)[place], 0),
                outputs=jnp.where(real, _flat(seen.outputs)[place], 0),
            )
            return {name: _added(name, total, expert, row) for name, total in sums.items()}

        sums = lax.fori_loop(0, used, add, start)
        return {name: _mirrored(total) if name in _FACTORS else total for name, total in sums.items()}


@dataclass(frozen=True)
class _Rows:
    real: Int[Array, "row 1"]
    inputs: Float[Array, "row hidden"]
    weights: Float[Array, "row 1"]
    intermediate: Float[Array, "row intermediate"]
    outputs: Float[Array, "row hidden"]

    @property
    def norms(self) -> Float[Array, "row 1"]:
        return jnp.linalg.norm(self.outputs, axis=1, keepdims=True)

    @property
    def energies(self) -> Float[Array, "row intermediate"]:
        return jnp.square(self.weights * self.intermediate)


def gram(rows: Float[AnyArray, "row size"]) -> Float[Array, "size size"]:
    """Return the sum of r r' over some rows r.

    Example:
        >>> gram(jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[1.0, 2.0], [2.0, 5.0]]
    """
    return _mirrored(_add_gram(jnp.zeros((1, rows.shape[1], rows.shape[1])), 0, rows))[0]


def _added(name: str, total: Array, expert, row: _Rows) -> Array:
    """Add a block of rows to the sums of its expert; peaks are merged by the maximum."""
    if name in _FACTORS:
        return _add_gram(total, expert, _FACTORS[name](row))
    place = total.at[expert]
    return (place.max if name == "channel_peaks" else place.add)(_SUMMANDS[name](row))


def _add_gram(total, expert, rows):
    """Add r r' of every row to the upper half of an expert's matrix; what lies below is left undefined."""
    return lax.platform_dependent(total, expert, rows, cpu=_add_panels, default=_add_whole)


def _add_whole(total, expert, rows):
    return total.at[expert].add(_product(rows, rows))


def _add_panels(total, expert, rows):
    for begin, end in _panels(rows.shape[1]):
        total = total.at[expert, begin:end, begin:].add(_product(rows[:, begin:end], rows[:, begin:]))
    return total


def _mirrored(total: Float[Array, "expert size size"]) -> Float[Array, "expert size size"]:
    for begin, end in _panels(total.shape[1]):
        own = total[:, begin:end, begin:end]
        # A product of rows with themselves need not be symmetric to the last bit: sums end in other orders.
        total = total.at[:, begin:end, begin:end].set(jnp.triu(own) + jnp.swapaxes(jnp.triu(own, 1), 1, 2))
        total = total.at[:, end:, begin:end].set(jnp.swapaxes(total[:, begin:end, end:], 1, 2))
    return total


def _panels(size: int) -> list[tuple[int, int]]:
    """Return where the rows of a symmetric matrix are cut: at most eight times, since narrow products are slow."""
    height = max(64, -(-size // 8))
    return [(begin, min(begin + height, size)) for begin in range(0, size, height)]


def _product(left: Float[Array, "row out"], right: Float[Array, "row in"]) -> Float[Array, "out in"]:
    return jnp.einsum("ro,ri->oi", left, right, precision=lax.Precision.HIGHEST)


def _flat(values) -> Array:
    return values.reshape(-1, values.shape[-1])


_SUMMANDS = {
    "counts": lambda row: jnp.sum(row.real),
    "weight_sums": lambda row: jnp.sum(row.weights),
    "input_sums": lambda row: jnp.sum(row.inputs, 0),
    "output_sums": lambda row: jnp.sum(row.outputs, 0),
    "output_norms": lambda row: jnp.sum(row.norms),
    "weighted_output_norms": lambda row: jnp.sum(row.weights * row.norms),
    "channel_energies": lambda row: jnp.sum(row.energies, 0),
    "channel_peaks": lambda row: jnp.max(row.energies, 0),
}
"""What the rows of one block add to an expert's sums."""

_FACTORS = {
    "input_moments": lambda row: row.inputs,
    "intermediate_moments": lambda row: row.intermediate,
    "weighted_input_moments": lambda row: row.weights * row.inputs,
    "weighted_intermediate_moments": lambda row: row.weights * row.intermediate,
}
"""The rows whose second moments are summed."""

POOLED = ("coactivation", "input_moment")
"""The sums that have no row for each expert."""
