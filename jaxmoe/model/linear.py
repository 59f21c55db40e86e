"""A linear map of activations, with the bias if there is one; its matrix is dense, or a sum of terms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.factors import CompressedLinear
from jaxmoe.factors.leaves import pytree


@pytree(static=("start", "stop"))
@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Some outputs of a compressed linear map that several maps were stored as, one below the other.

    Args:
        whole: that map.
        start: the first of the outputs.
        stop: one behind the last.
    """

    whole: CompressedLinear
    start: int
    stop: int

    def apply(self, x: Float[AnyArray, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return these outputs; under `jax.jit` the whole is computed once for all that are taken from it."""
        return self.whole.apply(x)[..., self.start : self.stop]

    def materialize(self) -> Float[Array, "out in"]:
        """Return the dense matrix, in float32."""
        return self.whole.materialize()[self.start : self.stop]


def linear(x: Float[AnyArray, "*batch in"], parameters: Mapping[str, Any], name: str) -> Float[Array, "*batch out"]:
    """Return `x Wᵀ + b` with `{name}.weight` and, where it is there, `{name}.bias`.

    Args:
        x: activations.
        parameters: the weight is an array `[out, in]`, a `CompressedLinear` or `Outputs` of one.
        name: of the map.

    Example:
        >>> linear(jnp.ones(2), {"a.weight": jnp.ones((3, 2)), "a.bias": jnp.arange(3.0)}, "a")
        Array([2., 3., 4.], dtype=float32)
    """
    weight = parameters[f"{name}.weight"]
    if isinstance(weight, CompressedLinear | Outputs):
        out = weight.apply(x)
    else:
        out = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))
    bias = parameters.get(f"{name}.bias")
    return out if bias is None else out + bias.astype(x.dtype)
