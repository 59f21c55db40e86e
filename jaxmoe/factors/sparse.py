"""Sparse: single entries of the experts' matrices, zero elsewhere.

Every entry stores a value and where it stands, two numbers; how many each expert has is stored beside. It is meant for
the few largest entries of what other terms leave over. The result is dense: `apply` forms the matrices.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.leaves import EVERY, Abstract, Leaf, plain, pytree
from jaxmoe.factors.registry import register
from jaxmoe.factors.spec import Number, TermSpec, shortened
from jaxmoe.factors.term import Term, per_expert


@register
@pytree(static=("experts", "out", "in_"))
@dataclass(frozen=True, kw_only=True)
class Sparse(Term):
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

    class Spec(TermSpec, tag="sparse"):
        entries: Number

    kind: ClassVar[str] = "sparse"
    values: Float[Leaf, "1 entry"]
    indices: Int[AnyArray | Abstract, "1 entry"]
    counts: Int[AnyArray | Abstract, "1 expert"]
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
        numbers, indices, counts = (jnp.asarray(plain(x))[0] for x in (self.values, self.indices, self.counts))
        expert = jnp.searchsorted(jnp.cumsum(counts), jnp.arange(numbers.shape[0]), side="right")
        wanted = np.arange(self.experts)[experts]
        # Entries of experts that are not asked for get a row behind the last one and fall away.
        row = np.full(self.experts, len(wanted))
        row[wanted] = np.arange(len(wanted))
        dense = jnp.zeros((len(wanted), self.out * self.in_), jnp.float32)
        row_of_entry = jnp.asarray(row).at[expert].get(mode="fill", fill_value=len(wanted))
        dense = dense.at[row_of_entry, indices].add(numbers.astype(jnp.float32), mode="drop")
        return dense.reshape(-1, self.out, self.in_)

    def apply(self, rows, product=per_expert):
        # Products with the few entries alone would gather and scatter for every row: slower than dense ones.
        return product(rows, self.materialize())

    def described(self):
        return self.Spec(entries=self.values.shape[1])

    @classmethod
    def planned(cls, spec, shape):
        return cls.abstract(shape, jnp.float32, entries=spec.entries)

    def checked(self):
        counts, indices, entries = np.asarray(self.counts, np.int64), np.asarray(self.indices), self.values.shape[1]
        if counts.sum() != entries or (counts < 0).any():
            raise JaxmoeError(f"counts of sparse entries {shortened(counts[0])} do not add up to {entries}")
        if indices.size and not 0 <= indices.min() <= indices.max() < self.out * self.in_:
            raise JaxmoeError(
                f"sparse entries {indices.min()} to {indices.max()} lie outside matrices of {self.out} x {self.in_}"
            )
        return self
