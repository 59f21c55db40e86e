"""Rotary position embedding: the angles, and the rotation.

A pair (a, b) of a head at position p becomes (a cos - b sin, b cos + a sin) with the angle p * frequency.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import Rotary


def angles(spec: Rotary, length: int) -> tuple[Float[Array, "position pair"], Float[Array, "position pair"]]:
    """Return cosines and sines of the positions 0 to length - 1.

    Raises:
        JaxmoeError: the embedding says nothing about so many positions.
    """
    beyond = spec.longest is not None and length > spec.longest
    if beyond and not spec.long_frequencies:
        raise JaxmoeError(f"{length} tokens: this position embedding is known up to {spec.longest}; give fewer")
    frequencies = np.asarray(spec.long_frequencies if beyond else spec.frequencies, np.float32)
    angle = np.arange(length, dtype=np.float32)[:, None] * frequencies
    scale = spec.long_scale if beyond else spec.scale
    return jnp.asarray(np.cos(angle) * np.float32(scale)), jnp.asarray(np.sin(angle) * np.float32(scale))


def rotate(x: Float[AnyArray, "*batch position head size"], spec: Rotary) -> Float[Array, "*batch position head size"]:
    """Rotate the first numbers of every head by its position."""
    size = 2 * len(spec.frequencies)
    cos, sin = (part[:, None, :].astype(x.dtype) for part in angles(spec, x.shape[-3]))
    turned, rest = x[..., :size], x[..., size:]
    if spec.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    # Queries and keys are rotated alike and only their products count, so pairs may end up as halves.
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
