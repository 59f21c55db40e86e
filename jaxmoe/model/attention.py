"""Causal attention: grouped heads, and DeepSeek's latent form of it.

    softmax(scale * q kᵀ + mask) v

Every sequence stands alone and starts at position 0. Scores and probabilities are computed in float32.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmoe.model.linear import linear
from jaxmoe.model.norm import normalize
from jaxmoe.model.rotary import rotate
from jaxmoe.model.spec import Attention, LatentAttention

Parameters = Mapping[str, Array]


def attend(
    x: Float[Array, "sequence position hidden"], parameters: Parameters, spec: Attention | LatentAttention
) -> Float[Array, "sequence position hidden"]:
    """Return what attention adds to the residual stream.

    Args:
        x: normalised hidden states.
        parameters: the layer's arrays, those of attention under `attention.`.
        spec: sizes and rules.
    """
    if isinstance(spec, LatentAttention):
        return _latent(x, parameters, spec)
    return _grouped(x, parameters, spec)


def _grouped(x, parameters: Parameters, spec: Attention):
    query, key, value = (linear(x, parameters, f"attention.{name}") for name in ("query", "key", "value"))
    if spec.norm is not None and spec.norm_over == "all":
        query = normalize(query, parameters, "attention.query_norm", spec.norm)
        key = normalize(key, parameters, "attention.key_norm", spec.norm)
    if spec.clip is not None:
        query, key, value = (jnp.clip(part, -spec.clip, spec.clip) for part in (query, key, value))
    query = query.reshape(*x.shape[:2], spec.heads, spec.head)
    key = key.reshape(*x.shape[:2], spec.kv_heads, spec.head)
    value = value.reshape(*x.shape[:2], spec.kv_heads, spec.value)

    def turned(part, name):
        if spec.rotary is not None and spec.norm_after_rotary:
            part = rotate(part, spec.rotary)
        if spec.norm is not None and spec.norm_over == "head":
            part = normalize(part, parameters, f"attention.{name}_norm", spec.norm)
        if spec.rotary is not None and not spec.norm_after_rotary:
            part = rotate(part, spec.rotary)
        return part

    sinks = parameters["attention.sinks"] if spec.sinks else None
    mixed = _mix(turned(query, "query"), turned(key, "key"), value, spec.scale, spec.window, sinks)
    return linear(mixed, parameters, "attention.output")


def _latent(x, parameters: Parameters, spec: LatentAttention):
    if spec.query_rank is None:
        query = linear(x, parameters, "attention.query")
    else:
        query = linear(x, parameters, "attention.query_down")
        query = normalize(query, parameters, "attention.query_down_norm", spec.norm)
        query = linear(query, parameters, "attention.query_up")
    query = query.reshape(*x.shape[:2], spec.heads, spec.plain + spec.rotated)
    query = jnp.concatenate([query[..., : spec.plain], rotate(query[..., spec.plain :], spec.rotary)], -1)
    small = linear(x, parameters, "attention.kv_down")
    position = rotate(small[..., None, spec.kv_rank :], spec.rotary)
    small = normalize(small[..., : spec.kv_rank], parameters, "attention.kv_down_norm", spec.norm)
    both = linear(small, parameters, "attention.kv_up").reshape(*x.shape[:2], spec.heads, spec.plain + spec.value)
    position = jnp.broadcast_to(position, (*both.shape[:3], spec.rotated))
    key = jnp.concatenate([both[..., : spec.plain], position], -1)
    mixed = _mix(query, key, both[..., spec.plain :], spec.scale, None, None)
    return linear(mixed, parameters, "attention.output")


def _mix(query, key, value, scale: float, window: int | None, sinks):
    """Return the values mixed by the attention probabilities, the heads side by side."""
    sequences, length, heads, _ = query.shape
    groups = heads // key.shape[2]
    query = query.reshape(sequences, length, key.shape[2], groups, -1)
    scores = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(_visible(length, window), scores, -jnp.inf)
    if sinks is None:
        probabilities = jax.nn.softmax(scores, axis=-1)
    else:
        sink = sinks.astype(jnp.float32).reshape(1, key.shape[2], groups, 1, 1)
        top = jnp.maximum(jnp.max(scores, -1, keepdims=True), sink)
        weights = jnp.exp(scores - top)
        probabilities = weights / (jnp.sum(weights, -1, keepdims=True) + jnp.exp(sink - top))
    mixed = jnp.einsum("bkgts,bskd->btkgd", probabilities.astype(value.dtype), value)
    return mixed.reshape(sequences, length, -1)


def _visible(length: int, window: int | None) -> np.ndarray:
    """Return which positions (columns) each position (row) sees."""
    distance = np.arange(length)[:, None] - np.arange(length)
    return (distance >= 0) & (distance < (window or length))
