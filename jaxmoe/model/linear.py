"""A linear map of activations, with the bias if there is one."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(x: Float[Array, "*batch in"], parameters: Mapping[str, Array], name: str) -> Float[Array, "*batch out"]:
    """Return `x Wᵀ + b` with `{name}.weight`, `[out, in]`, and, where it is there, `{name}.bias`.

    Example:
        >>> linear(jnp.ones(2), {"a.weight": jnp.ones((3, 2)), "a.bias": jnp.arange(3.0)}, "a")
        Array([2., 3., 4.], dtype=float32)
    """
    out = jnp.einsum("...i,oi->...o", x, parameters[f"{name}.weight"].astype(x.dtype))
    bias = parameters.get(f"{name}.bias")
    return out if bias is None else out + bias.astype(x.dtype)
