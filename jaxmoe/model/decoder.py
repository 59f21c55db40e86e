"""The ends of a decoder, and a whole one for models that fit into memory.

logits = head(norm(layers(embed(tokens))))
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.model.layer import layer
from jaxmoe.model.linear import linear
from jaxmoe.model.norm import normalize
from jaxmoe.model.spec import DecoderSpec


def embed(
    tokens: Int[AnyArray, "sequence position"], parameters: Mapping[str, Any], spec: DecoderSpec
) -> Float[Array, "sequence position hidden"]:
    """Return the hidden states that enter the first layer, in float32."""
    return parameters["embedding.weight"][tokens].astype(jnp.float32) * spec.embedding_scale


def head(
    x: Float[AnyArray, "*batch hidden"], parameters: Mapping[str, Any], spec: DecoderSpec
) -> Float[Array, "*batch vocabulary"]:
    """Return the logits of the next token from the hidden states that leave the last layer."""
    x = normalize(x, parameters, "norm", spec.norm)
    weight = parameters["embedding.weight" if spec.tied else "head.weight"].astype(x.dtype)
    if spec.head_norm:
        weight = weight / (jnp.linalg.norm(weight, axis=0, keepdims=True) + 1e-7)
    ends = {"head.weight": weight}
    if spec.head_bias:
        ends["head.bias"] = parameters["head.bias"]
    return linear(x, ends, "head") * spec.logit_scale


def forward(
    tokens: Int[AnyArray, "sequence position"], parameters: Mapping[str, Any], spec: DecoderSpec
) -> Float[Array, "sequence position vocabulary"]:
    """Return the logits of every position.

    Args:
        tokens: every sequence starts at position 0; a padded end changes nothing before it.
        parameters: `embedding.weight`, `norm.weight`, `head.weight`, and under `layers` the parameters of each layer.
        spec: what the decoder computes; static.
    """
    x = embed(tokens, parameters, spec)
    for own, rules in zip(parameters["layers"], spec.layers, strict=True):
        x, _ = layer(x, own, rules)
    return head(x, parameters, spec)
