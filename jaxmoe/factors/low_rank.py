"""LowRank: a thin pair of factors for every expert."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jaxmoe.factors.leaves import EVERY, Abstract, Leaf, plain, pytree, values
from jaxmoe.factors.registry import register
from jaxmoe.factors.spec import Size, TermSpec
from jaxmoe.factors.term import Term, Work, per_expert


@register
@pytree()
@dataclass(frozen=True, kw_only=True)
class LowRank(Term):
    """L_e R_e, with one rank for all experts.

    Stored numbers: experts * rank * (out + in), fewer than dense only for rank < out * in / (out + in).

    Args:
        left: `[expert, out, rank]`.
        right: `[expert, rank, in]`.

    Example:
        >>> term = LowRank(left=jnp.ones((2, 3, 1)), right=jnp.ones((2, 1, 4)))
        >>> term.materialize().shape, term.count().numbers
        ((2, 3, 4), 14)
    """

    class Spec(TermSpec, tag="low_rank"):
        rank: Size

    kind: ClassVar[str] = "low_rank"
    left: Float[Leaf, "expert out rank"]
    right: Float[Leaf, "expert rank in"]

    @classmethod
    def abstract(cls, shape, dtype, *, rank: int) -> "LowRank":
        """Return the term without values: `shape` is `(experts, out, in)`."""
        experts, out, in_ = shape
        return cls(left=Abstract((experts, out, rank), dtype), right=Abstract((experts, rank, in_), dtype))

    @property
    def shape(self):
        experts, out = self.left.shape[:2]
        return experts, out, self.right.shape[2]

    @property
    def rank(self) -> int:
        return self.left.shape[2]

    def materialize(self, experts=EVERY):
        left, right = (values(x, experts) for x in (self.left, self.right))
        return jnp.einsum("eor,eri->eoi", left, right, precision=lax.Precision.HIGHEST)

    def apply(self, rows, product=per_expert):
        return product(product(rows, plain(self.right)), plain(self.left))

    def work(self, chosen):
        experts, out, in_ = self.shape
        return Work(self.count().numbers * chosen / experts, 2.0 * chosen * self.rank * (out + in_))

    def described(self):
        return self.Spec(rank=self.rank)

    @classmethod
    def planned(cls, spec, shape):
        return cls.abstract(shape, jnp.float32, rank=spec.rank)
