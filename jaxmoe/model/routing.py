"""Routing: which experts a token goes to and with what weights, one function for all families.

The order of operations differs between families in ways that change the result: softmax over all experts or over the
chosen ones, biases that count for the choice alone, groups of experts, sums with an epsilon. Logits, scores and weights
are float32. Of equal scores the lowest index is chosen (`jax.lax.top_k`); PyTorch leaves that open.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.model.spec import Router

TIES = "of equal scores the lowest expert index is chosen"


class Routes(NamedTuple):
    """The chosen experts and their weights, best first."""

    experts: Int[Array, "token choice"]
    weights: Float[Array, "token choice"]


def route(x: Float[AnyArray, "token hidden"], parameters: Mapping[str, Any], spec: Router) -> Routes:
    """Choose `top_k` experts for every token.

    Args:
        x: the tokens as the router sees them.
        parameters: `router.weight` `[expert, hidden]`; `router.bias`, `router.selection_bias` where the spec says so.
        spec: the rule.

    Example:
        >>> spec = Router(experts=3, top_k=2, normalize=True)
        >>> route(jnp.ones((1, 1)), {"router.weight": jnp.array([[0.0], [2.0], [1.0]])}, spec).experts
        Array([[1, 2]], dtype=int32)
    """
    logits = router_logits(x, parameters, spec)
    if spec.score == "sparse_mixer":
        return _sparse_mixer(logits, spec.jitter)
    if spec.score == "chosen":
        best, experts = lax.top_k(logits, spec.top_k)
        return Routes(experts, jax.nn.softmax(best, axis=-1) * spec.scale)
    scores = jax.nn.softmax(logits, axis=-1) if spec.score == "softmax" else jax.nn.sigmoid(logits)
    choice = scores
    if spec.selection_bias:
        choice = choice + parameters["router.selection_bias"].astype(jnp.float32).reshape(-1)
    if spec.groups > 1:
        choice = _within_groups(choice, spec)
    _, experts = lax.top_k(choice, spec.top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if spec.normalize:
        weights = weights / jnp.maximum(jnp.sum(weights, -1, keepdims=True) + spec.epsilon, spec.floor)
    return Routes(experts, weights * spec.scale)


def router_logits(
    x: Float[AnyArray, "token hidden"], parameters: Mapping[str, Any], spec: Router
) -> Float[Array, "token expert"]:
    """Return what the router makes of the tokens, before any score; arguments as of `route`."""
    weight = parameters["router.weight"].astype(jnp.float32)
    # A token near the border between two experts must not change sides for the sake of a faster product.
    logits = jnp.einsum("th,eh->te", x.astype(jnp.float32), weight, precision=lax.Precision.HIGHEST)
    return logits + parameters["router.bias"].astype(jnp.float32) if spec.bias else logits


def _within_groups(choice, spec: Router):
    """Return the scores with the experts outside of the best groups put out of reach."""
    grouped = choice.reshape(len(choice), spec.groups, -1)
    if spec.group_score == "max":
        worth, rest = jnp.max(grouped, -1), 0.0
    else:
        worth, rest = jnp.sum(lax.top_k(grouped, 2)[0], -1), -jnp.inf
    _, kept = lax.top_k(worth, spec.kept_groups)
    open_ = jnp.any(kept[:, :, None] == jnp.arange(spec.groups), axis=1)
    return jnp.where(open_[:, :, None], grouped, rest).reshape(choice.shape)


def _sparse_mixer(logits, jitter: float) -> Routes:
    """Choose two experts one after the other, each weighted among those within reach of the best (Phi-3.5-MoE)."""

    def pick(left):
        best = jnp.max(left, -1, keepdims=True)
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * jitter
        expert = jnp.argmax(left, -1, keepdims=True)
        return expert, jnp.take_along_axis(jax.nn.softmax(jnp.where(far, -jnp.inf, left), -1), expert, -1)

    first, first_weight = pick(logits)
    taken = first == jnp.arange(logits.shape[-1])
    second, second_weight = pick(jnp.where(taken, -jnp.inf, logits))
    return Routes(jnp.concatenate([first, second], -1), jnp.concatenate([first_weight, second_weight], -1))
