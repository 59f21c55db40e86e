"""The sums of one batch in one layer, as a pure function of what the layer's experts saw and did.

Assignments of tokens to experts are sorted into blocks of one expert each (`model.grouped`), and a loop over the blocks
adds up products in float32 at the highest precision; the caller adds batches up in float64. The second moments of some
of the experts can be asked for alone, where those of all would not fit into memory.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.calibration.statistics import FIELDS
from jaxmoe.factors import LayerShape
from jaxmoe.factors.term import pytree
from jaxmoe.model.grouped import BlockShape, arrange, block_rows, most_blocks
from jaxmoe.model.layer import Intermediates


@pytree(static=("shape", "names", "experts"))
@dataclass(frozen=True, kw_only=True)
class Summing:
    """What to sum, as a function that is a pytree: all that differ in `first` alone share a compiled program.

    Args:
        shape: of the layer.
        names: of the arrays to sum, from `FIELDS`.
        first: the first expert whose rows are returned.
        experts: how many experts' rows are returned.

    Example:
        >>> import jax
        >>> jax.tree.leaves(Summing(shape=LayerShape(4, 8, 6), names=("counts",), experts=2, first=2))
        [2]
    """

    shape: LayerShape
    names: tuple[str, ...]
    experts: int
    first: int = 0

    def __call__(self, seen: Intermediates, counted: Bool[Array, "sequence position"]) -> dict[str, Array]:
        """Return the sums of a batch by name, in float32 and int32; of per-expert ones only the chosen rows."""
        assert seen.routes is not None
        counted = counted.reshape(-1)
        sums = {}
        if {*POOLED} & {*self.names}:
            hits = jnp.any(seen.routes.experts[:, :, None] == jnp.arange(self.shape.experts), 1) & counted[:, None]
            # Whole numbers below 2^24 are exact.
            sums["coactivation"] = _gram(hits.astype(jnp.float32)).astype(jnp.int32)
            sums["input_moment"] = _gram(jnp.where(counted[:, None], seen.inputs, 0))
        if any(name not in sums for name in self.names):
            sums |= self._by_expert(seen, counted)
        return {name: sums[name] for name in self.names}

    def _by_expert(self, seen: Intermediates, counted) -> dict[str, Array]:
        assert seen.routes is not None
        chosen, weights = seen.routes
        local = chosen - self.first
        mine = counted[:, None] & (local >= 0) & (local < self.experts)
        # What is not asked for goes to one expert more, behind the blocks that the loop visits.
        local = jnp.where(mine, local, self.experts)
        rows = block_rows(chosen.size, self.experts)
        blocks = arrange(local, self.experts + 1, BlockShape(rows, most_blocks(chosen.size, self.experts + 1, rows)))
        used = jnp.sum(blocks.expert < self.experts)
        names = [name for name in self.names if name in _PRODUCTS]
        start = {
            name: jnp.zeros(
                (self.experts, *FIELDS[name].shape(self.shape)[1:]), jnp.int32 if name == "counts" else jnp.float32
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
            return {
                name: (total.at[expert].max if name == "channel_peaks" else total.at[expert].add)(_PRODUCTS[name](row))
                for name, total in sums.items()
            }

        return lax.fori_loop(0, used, add, start)


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


def _gram(rows: Float[Array, "row size"]) -> Float[Array, "size size"]:
    return jnp.einsum("ri,rj->ij", rows, rows, precision=lax.Precision.HIGHEST)


def _flat(values) -> Array:
    return values.reshape(-1, values.shape[-1])


_PRODUCTS = {
    "counts": lambda row: jnp.sum(row.real),
    "weight_sums": lambda row: jnp.sum(row.weights),
    "input_sums": lambda row: jnp.sum(row.inputs, 0),
    "output_sums": lambda row: jnp.sum(row.outputs, 0),
    "output_norms": lambda row: jnp.sum(row.norms),
    "weighted_output_norms": lambda row: jnp.sum(row.weights * row.norms),
    "channel_energies": lambda row: jnp.sum(row.energies, 0),
    "channel_peaks": lambda row: jnp.max(row.energies, 0),
    "input_moments": lambda row: _gram(row.inputs),
    "intermediate_moments": lambda row: _gram(row.intermediate),
    "weighted_input_moments": lambda row: _gram(row.weights * row.inputs),
    "weighted_intermediate_moments": lambda row: _gram(row.weights * row.intermediate),
}
"""What the rows of one block add to an expert's sums; peaks are merged by the maximum."""

POOLED = ("coactivation", "input_moment")
"""The sums that have no row for each expert."""
