"""Dense: the matrices themselves, for projections that a method leaves alone or that factors cannot shrink."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Float

from jaxmoe.factors.leaves import EVERY, Abstract, Leaf, plain, pytree, values
from jaxmoe.factors.registry import register
from jaxmoe.factors.spec import TermSpec
from jaxmoe.factors.term import Term, per_expert


@register
@pytree()
@dataclass(frozen=True, kw_only=True)
class Dense(Term):
    """W_e itself.

    Args:
        weight: the matrices, `[expert, out, in]`.

    Example:
        >>> term = Dense(weight=jnp.ones((2, 3, 4)))
        >>> term.shape, term.count().numbers
        ((2, 3, 4), 24)
    """

    class Spec(TermSpec, tag="dense"):
        """No sizes: all of them are the layer's."""

    kind: ClassVar[str] = "dense"
    named: ClassVar[Mapping[str, str]] = {"weight": "dense"}
    weight: Float[Leaf, "expert out in"]

    @classmethod
    def abstract(cls, shape, dtype) -> "Dense":
        """Return the term without values: `shape` is `(experts, out, in)`."""
        return cls(weight=Abstract(tuple(shape), dtype))

    @property
    def shape(self):
        experts, out, in_ = self.weight.shape
        return experts, out, in_

    def materialize(self, experts=EVERY):
        return values(self.weight, experts)

    def apply(self, rows, product=per_expert):
        return product(rows, plain(self.weight))

    def described(self):
        return self.Spec()

    @classmethod
    def planned(cls, spec, shape):
        return cls.abstract(shape, jnp.float32)
