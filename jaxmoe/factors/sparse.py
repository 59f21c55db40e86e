"""Sparse: single entries of the experts' matrices, zero elsewhere.

Every entry stores a value and where it stands, two numbers; how many each expert has is stored beside. It is meant for
the few largest entries of what other terms leave over. The result is dense: `apply` forms the matrices.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.term import EVERY, Abstract, Count, count_arrays, per_expert, pytree


@pytree(static=("experts", "out", "in_"))
@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Values at places; where a place is named twice, their sum.

    Stored numbers: 2 * entries + experts.

    Args:
        values: of all entries, one expert's after the other's, `[1, entry]`.
        indices: where each stands in its expert's matrix, counted row by row, int32, `[1, entry]`.
        counts: entries of each expert, int32, `[1, expert]`.
        experts: how many there are.
        out: outputs of a matrix.
        in_: its inputs.

    Example:
        >>> term = Sparse(
        ...     values=jnp.array([[1.0, 2.0]]), indices=jnp.array([[5, 0]]), counts=jnp.array([[1, 1]]),
        ...     experts=2, out=2, in_=3)
        >>> term.materialize().tolist()
        [[[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
    """

    kind: ClassVar[str] = "sparse"
    for_all: ClassVar[bool] = False
    values: Float[Array | Abstract, "1 entry"]
    indices: Int[Array | Abstract, "1 entry"]
    counts: Int[Array | Abstract, "1 expert"]
    experts: int
    out: int
    in_: int

    @classmethod
    def abstract(cls, shape, dtype, *, entries: int) -> "Sparse":
        """Return the term without values: `shape` is `(experts, out, in)`, `entries` the sum over all experts."""
        experts, out, in_ = shape
        return cls(
            values=Abstract((1, entries), dtype),
            indices=Abstract((1, entries), jnp.int32),
            counts=Abstract((1, experts), jnp.int32),
            experts=experts,
            out=out,
            in_=in_,
        )

    @property
    def shape(self):
        return self.experts, self.out, self.in_

    def materialize(self, experts=EVERY):
        values, indices, counts = (jnp.asarray(x)[0] for x in (self.values, self.indices, self.counts))
        expert = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(values.shape[0]), side="right")
        wanted = np.arange(self.experts)[experts]
        # Entries of experts that are not asked for get a row behind the last one and fall away.
        row = np.full(self.experts, len(wanted))
        row[wanted] = np.arange(len(wanted))
        dense = jnp.zeros((len(wanted), self.out * self.in_), jnp.float32)
        row_of_entry = jnp.asarray(row).at[expert].get(mode="fill", fill_value=len(wanted))
        dense = dense.at[row_of_entry, indices].add(values.astype(jnp.float32), mode="drop")
        return dense.reshape(-1, self.out, self.in_)

    def apply(self, rows, product=per_expert):
        # Products with the few entries alone would gather and scatter for every row: slower than dense ones.
        return product(rows, self.materialize())

    def count(self) -> Count:
        return count_arrays(self.tensors().values())

    def tensors(self):
        return {"values": self.values, "indices": self.indices, "counts": self.counts}

    def spec(self):
        return {"kind": self.kind, "entries": self.values.shape[1]}

    @classmethod
    def from_tensors(cls, tensors, spec, shape):
        expected = cls.abstract(shape, tensors["values"].dtype, entries=spec["entries"])
        counts, indices = (np.asarray(tensors[name]) for name in ("counts", "indices"))
        if counts.sum() != spec["entries"] or (counts < 0).any():
            raise JaxmoeError(f"counts of sparse entries {counts.tolist()} do not add up to {spec['entries']}")
        if indices.size and not 0 <= indices.min() <= indices.max() < shape[1] * shape[2]:
            raise JaxmoeError(
                f"sparse entries {indices.min()} to {indices.max()} lie outside matrices of {shape[1]} x {shape[2]}"
            )
        return replace(
            expected, **{name: tensors[name].reshape(getattr(expected, name).shape) for name in expected.tensors()}
        )
