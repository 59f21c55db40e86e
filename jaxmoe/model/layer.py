"""One decoder layer as a pure function, and its two halves.

    x + attention(norm(x)), then x + feed_forward(norm(x)), or both from one norm(x)

The halves meet where the routing is known: a program that streams a model counts the assignments there, on the host,
and chooses blocks of the right size for the second half. In between everything is a pytree of arrays.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.model.attention import attend
from jaxmoe.model.blocked import BlockShape
from jaxmoe.model.compressed_experts import by_weight, divide, input_scales
from jaxmoe.model.experts import ExpertRows, gated, run_experts
from jaxmoe.model.linear import linear
from jaxmoe.model.norm import normalize
from jaxmoe.model.roles import BLOCK_INPUT
from jaxmoe.model.routing import Routes, route
from jaxmoe.model.spec import DenseBlock, ExpertBlock, LayerSpec

Parameters = Mapping[str, Any]


class Attended(NamedTuple):
    """A layer after its attention.

    residual: the residual stream; inputs: what the feed-forward block reads, one row per token; routes: of these
    tokens, those of the experts that run first; None in a layer without experts; reads: what the linear maps of
    attention read, by name (`roles.py`).
    """

    residual: Float[AnyArray, "sequence position hidden"]
    inputs: Float[AnyArray, "token hidden"]
    routes: Routes | None
    reads: Mapping[str, AnyArray] = {}


class Intermediates(NamedTuple):
    """What happened inside a layer: the experts' inputs, and of those that run routes, what down reads, and outputs.

    Inputs are as the router sees them, and outputs unweighted; routes and what the routed experts did are None in a
    layer without them. `reads` holds what all other linear maps read, one row per token, by name (`roles.py`).
    """

    inputs: Float[AnyArray, "token hidden"]
    routes: Routes | None
    intermediate: Float[Array, "token choice intermediate"] | None
    outputs: Float[Array, "token choice hidden"] | None
    reads: Mapping[str, AnyArray] = {}


def layer(
    x: Float[AnyArray, "sequence position hidden"],
    parameters: Parameters,
    spec: LayerSpec,
    *,
    shape: BlockShape | None = None,
    probes: Mapping[str, Array] | None = None,
    documents: Int[AnyArray, "sequence position"] | None = None,
) -> tuple[Float[Array, "sequence position hidden"], Intermediates]:
    """Run one decoder layer.

    Args:
        x: hidden states; every sequence starts at position 0 and has no padding before its tokens.
        parameters: the layer's arrays by name, the routed experts as a `CompressedLayer` under `experts`.
        spec: what the layer computes; static.
        shape: of the experts' blocks, see `run_experts`.
        probes: see `run_experts`.
        documents: see `attend`.

    Returns:
        The hidden states after the layer, and what happened inside; what is not used costs nothing under `jax.jit`.
    """
    return finish(attended(x, parameters, spec, documents), parameters, spec, shape=shape, probes=probes)


def attended(
    x: Float[AnyArray, "sequence position hidden"],
    parameters: Parameters,
    spec: LayerSpec,
    documents: Int[AnyArray, "sequence position"] | None = None,
) -> Attended:
    """Run the first half of a layer: attention, the normalisation behind it, and the routing."""
    first = _before(x, parameters, "input_norm", spec)
    added, reads = attend(first, parameters, spec.attention, documents)
    x = x + _after(added, parameters, "input_norm", spec) * spec.multiplier
    second = first if spec.parallel else _before(x, parameters, "post_norm", spec)
    inputs = second.reshape(-1, spec.hidden)
    block, routes = spec.feed_forward, None
    if isinstance(block, ExpertBlock):
        routes = route(inputs, parameters, block.router)
        if block.running < block.router.top_k:
            routes = by_weight(routes)
    return Attended(x, inputs, routes, reads)


def finish(
    state: Attended,
    parameters: Parameters,
    spec: LayerSpec,
    *,
    shape: BlockShape | None = None,
    probes: Mapping[str, Array] | None = None,
) -> tuple[Float[Array, "sequence position hidden"], Intermediates]:
    """Run the second half of a layer: the feed-forward block."""
    x, inputs, routes, reads = state
    reads = {name: rows.reshape(-1, rows.shape[-1]) for name, rows in reads.items()} | {BLOCK_INPUT: inputs}
    block = spec.feed_forward
    if isinstance(block, DenseBlock):
        added, inner = dense(inputs, parameters, "feed_forward", block)
        seen = Intermediates(inputs, None, None, None, reads | {"feed_forward.intermediate": inner})
    else:
        assert routes is not None
        rows, routes = routed(inputs, routes, parameters, block, shape=shape, probes=probes)
        added = rows.combined
        if block.shared is not None:
            out, inner = dense(inputs, parameters, "shared", block.shared)
            reads |= {"shared.intermediate": inner}
            added = added + (
                jax.nn.sigmoid(linear(inputs, parameters, "shared_gate")) * out if block.shared_gate else out
            )
        seen = Intermediates(inputs, routes, rows.intermediate, rows.output, reads)
        added = added * block.scale
    added = _after(added.reshape(x.shape), parameters, "post_norm", spec)
    return jnp.asarray(x + added * spec.multiplier), seen


def routed(
    x: Float[AnyArray, "token hidden"],
    routes: Routes,
    parameters: Parameters,
    block: ExpertBlock,
    *,
    shape: BlockShape | None = None,
    probes: Mapping[str, Array] | None = None,
) -> tuple[ExpertRows, Routes]:
    """Run those of a layer's routed experts that are to run, with what compensates for the others.

    Args:
        x: the tokens, as the router sees them.
        routes: of all chosen experts; where not all run, in descending order of weights.
        parameters: of the layer.
        block: how many run.
        shape: of the experts' blocks, see `run_experts`.
        probes: see `run_experts`.

    Returns:
        What the experts did, and the routes of those that ran.
    """
    biases = {name: parameters[f"experts.{name}.bias"] for name in ("gate", "up", "down") if block.bias}
    scales = None
    if block.running < block.router.top_k:
        routes, auxiliary = divide(routes, block.running, block.renorm)
        scales = input_scales(auxiliary, parameters)
    experts, weights = routes
    rows = run_experts(x, experts, parameters["experts"], block.gate, biases, shape, probes, weights, scales)
    return rows, routes


def dense(
    x: Float[AnyArray, "token hidden"], parameters: Parameters, name: str, spec: DenseBlock
) -> tuple[Float[Array, "token hidden"], Float[Array, "token intermediate"]]:
    """Run a gated network that all tokens use; its matrices stand under `{name}.gate`, `.up` and `.down`.

    Returns:
        Its output, and what down reads.
    """
    gate, up = linear(x, parameters, f"{name}.gate"), linear(x, parameters, f"{name}.up")
    inner = gated(gate, up, spec.gate)
    return linear(inner, parameters, f"{name}.down"), inner


def _before(x, parameters: Parameters, name: str, spec: LayerSpec):
    return normalize(x, parameters, name, spec.norm) if spec.before else x


def _after(x, parameters: Parameters, name: str, spec: LayerSpec):
    if not spec.after:
        return x
    return normalize(x, parameters, f"{name}_after" if spec.before else name, spec.norm)
