"""Dense: the matrices themselves, for projections that a method leaves alone or that factors cannot shrink."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.factors.term import EVERY, Abstract, Count, count_arrays, per_expert, pytree, stack_rows


@pytree()
@dataclass(frozen=True, kw_only=True)
class Dense:
    """W_e itself.

    Args:
        weight: the matrices, `[expert, out, in]`.

    Example:
        >>> term = Dense(weight=jnp.ones((2, 3, 4)))
        >>> term.shape, term.count().numbers
        ((2, 3, 4), 24)
    """

    kind: ClassVar[str] = "dense"
    for_all: ClassVar[bool] = False
    weight: Float[Array | Abstract, "expert out in"]

    @classmethod
    def abstract(cls, shape, dtype) -> "Dense":
        """Return the term without values: `shape` is `(experts, out, in)`."""
        return cls(weight=Abstract(tuple(shape), dtype))

    @property
    def shape(self):
        experts, out, in_ = self.weight.shape
        return experts, out, in_

    def materialize(self, experts=EVERY):
        return jnp.asarray(self.weight[experts], jnp.float32)

    def apply(self, rows, product=per_expert):
        return product(rows, self.weight)

    def count(self) -> Count:
        return count_arrays([self.weight])

    def tensors(self):
        return {"dense": stack_rows(self.weight)}

    def spec(self):
        return {"kind": self.kind}

    @classmethod
    def from_tensors(cls, tensors, spec, shape):
        return cls(weight=tensors["dense"].reshape(shape))
