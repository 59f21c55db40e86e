"""Normalisation of the last axis, computed in float32."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.model.spec import Norm


def normalize(
    x: Float[AnyArray, "*batch size"], parameters: Mapping[str, Any], name: str, spec: Norm
) -> Float[Array, "*batch size"]:
    """Normalise by the root mean square ("rms") or by mean and deviation ("layer"), then scale by the weight.

    Args:
        x: what to normalise.
        parameters: holds `{name}.weight` and, where the spec has one, `{name}.bias`.
        name: of the normalisation.
        spec: its kind and epsilon.

    Example:
        >>> normalize(jnp.array([5.0, -5.0]), {"norm.weight": jnp.ones(2)}, "norm", Norm(epsilon=0.0))
        Array([ 1., -1.], dtype=float32)
    """
    wide = jnp.asarray(x, jnp.float32)
    if spec.kind == "layer":
        wide = wide - jnp.mean(wide, -1, keepdims=True)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + spec.epsilon)
    out = wide * parameters[f"{name}.weight"].astype(jnp.float32)
    if spec.bias:
        out = out + parameters[f"{name}.bias"].astype(jnp.float32)
    return out.astype(x.dtype)
