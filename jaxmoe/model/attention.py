"""Causal attention: grouped heads, and DeepSeek's latent form of it.

    softmax(scale * q kᵀ + mask) v

Every sequence stands alone and starts at position 0. Several documents may be packed into one sequence: what a token
sees then ends where its document begins, and as positions count only relative to each other, nothing else changes.
Scores and probabilities are computed in float32.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.model.linear import linear
from jaxmoe.model.norm import normalize
from jaxmoe.model.rotary import rotate
from jaxmoe.model.spec import Attention, LatentAttention

Parameters = Mapping[str, Any]
Reads = dict[str, Float[AnyArray, "sequence position _"]]


def attend(
    x: Float[AnyArray, "sequence position hidden"],
    parameters: Parameters,
    spec: Attention | LatentAttention,
    documents: Int[AnyArray, "sequence position"] | None = None,
) -> tuple[Float[Array, "sequence position hidden"], Reads]:
    """Return what attention adds to the residual stream, and what its linear maps read by name (`roles.py`).

    Args:
        x: normalised hidden states.
        parameters: the layer's arrays, those of attention under `attention.`.
        spec: sizes and rules.
        documents: a number for each token's document: tokens of other documents are not seen. None for one document.
    """
    if isinstance(spec, LatentAttention):
        return _latent(x, parameters, spec, documents)
    return _grouped(x, parameters, spec, documents)


def _grouped(x, parameters: Parameters, spec: Attention, documents):
    query, key, value = (linear(x, parameters, f"attention.{name}") for name in ("query", "key", "value"))
    if spec.norm is not None and spec.norm_over == "all":
        query = normalize(query, parameters, "attention.query_norm", spec.norm)
        key = normalize(key, parameters, "attention.key_norm", spec.norm)
    if spec.clip is not None:
        query, key, value = (jnp.clip(part, -spec.clip, spec.clip) for part in (query, key, value))
    query = query.reshape(*x.shape[:2], spec.heads, spec.head)
    key = key.reshape(*x.shape[:2], spec.kv_heads, spec.head)
    value = value.reshape(*x.shape[:2], spec.kv_heads, spec.value) * spec.value_scale

    def turned(part, name):
        if spec.rotary is not None and spec.norm_after_rotary:
            part = rotate(part, spec.rotary)
        if spec.norm is not None and spec.norm_over == "head":
            part = normalize(part, parameters, f"attention.{name}_norm", spec.norm)
        if spec.rotary is not None and not spec.norm_after_rotary:
            part = rotate(part, spec.rotary)
        return part

    sinks = parameters["attention.sinks"] if spec.sinks else None
    mixed = _mix(turned(query, "query"), turned(key, "key"), value, spec.scale, spec.window, sinks, documents)
    if spec.gated:
        mixed = mixed * jax.nn.sigmoid(linear(x, parameters, "attention.gate"))
    return linear(mixed, parameters, "attention.output"), {"attention.input": x, "attention.mixed": mixed}


def _latent(x, parameters: Parameters, spec: LatentAttention, documents):
    reads = {"attention.input": x}
    if spec.query_rank is None:
        query = linear(x, parameters, "attention.query")
    else:
        query = linear(x, parameters, "attention.query_down")
        query = normalize(query, parameters, "attention.query_down_norm", spec.norm)
        reads["attention.query_latent"] = query
        query = linear(query, parameters, "attention.query_up")
    query = query.reshape(*x.shape[:2], spec.heads, spec.plain + spec.rotated)
    query = jnp.concatenate([query[..., : spec.plain], rotate(query[..., spec.plain :], spec.rotary)], -1)
    small = linear(x, parameters, "attention.kv_down")
    position = rotate(small[..., None, spec.kv_rank :], spec.rotary)
    small = normalize(small[..., : spec.kv_rank], parameters, "attention.kv_down_norm", spec.norm)
    both = linear(small, parameters, "attention.kv_up").reshape(*x.shape[:2], spec.heads, spec.plain + spec.value)
    position = jnp.broadcast_to(position, (*both.shape[:3], spec.rotated))
    key = jnp.concatenate([both[..., : spec.plain], position], -1)
    mixed = _mix(query, key, both[..., spec.plain :], spec.scale, None, None, documents)
    reads |= {"attention.kv_latent": small, "attention.mixed": mixed}
    return linear(mixed, parameters, "attention.output"), reads


def _mix(query, key, value, scale: float, window: int | None, sinks, documents):
    """Return the values mixed by the attention probabilities, the heads side by side.

    Queries are worked on in chunks, each with the keys that any of them sees: half of the scores never exist, the rest
    stay small enough for caches, and no more than one chunk's are in memory.
    """
    sequences, length, heads, _ = query.shape
    groups = key.shape[2]
    query = jnp.moveaxis(query.reshape(sequences, length, groups, heads // groups, -1), 1, 3) * scale
    key, value = jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, groups, heads // groups, 1, 1)
    size = min(256, max(64, -(-length // 8)))
    # The backward pass over a long sequence computes the probabilities again instead of keeping them.
    mix = jax.checkpoint(_mix_chunk) if length > 512 else _mix_chunk
    chunks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if window is None else max(0, start - window + 1)
        distance = np.arange(start, end)[:, None] - np.arange(first, end)
        seen = (distance >= 0) & (distance < (window or length))
        if documents is not None:
            same = documents[:, start:end, None] == documents[:, None, first:end]
            seen = (seen & same)[:, None, None]
        seen_keys, seen_values = key[:, :, first:end], value[:, :, first:end]
        chunks.append(mix(query[:, :, :, start:end], seen_keys, seen_values, seen, sinks))
    mixed = jnp.concatenate(chunks, axis=3)
    return jnp.moveaxis(mixed, 3, 1).reshape(sequences, length, -1)


def _mix_chunk(query, key, value, seen, sinks):
    sequences, groups, share, length, _ = query.shape

    def product(left, equation, right):
        """Multiply with the heads of a group as further rows, so that one batched product does them all."""
        rows = left.reshape(sequences, groups, share * length, -1)
        out = jnp.einsum(equation, rows, right, preferred_element_type=jnp.float32)
        return out.reshape(sequences, groups, share, length, -1)

    scores = jnp.where(seen, product(query, "bgtd,bgsd->bgts", key), -jnp.inf)
    top = jnp.max(scores, -1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    top = lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, -1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    return (product(weights.astype(value.dtype), "bgts,bgsd->bgtd", value) / total).astype(value.dtype)
