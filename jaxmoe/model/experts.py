"""The routed experts of one layer, run as they are stored: dense, low-rank or as mixtures of bases.

    f_e(x) = down_e ( activation(gate_e x) * (up_e x) ),        y = sum_k w_k f_k(x)

Every term is applied to the rows of its experts without forming the dense matrices. A term whose matrix B is the same
for all experts is applied once for every token, however many experts the token has: for gate and up before the token
goes to its experts, and for down behind their weighted sum,

    sum_k w_k (W_k + B) h_k  =  sum_k w_k W_k h_k  +  B sum_k w_k h_k
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer
from jaxmoe.model.grouped import (
    BlockShape,
    arrange,
    block_product,
    block_rows,
    gather,
    gather_tokens,
    most_blocks,
    ragged_product,
    scatter,
)
from jaxmoe.model.spec import Gate

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""The activations of gated networks by the config's name."""


class ExpertRows(NamedTuple):
    """What the chosen experts did with every token: activations, outputs before any weight, and their weighted sum.

    The sum does not need `output`: under `jax.jit` only what is used is computed.
    """

    intermediate: Float[Array, "token choice intermediate"]
    output: Float[Array, "token choice hidden"]
    combined: Float[Array, "token hidden"]


def gated(gate: Array, up: Array, spec: Gate) -> Array:
    """Return activation(gate) * up, with the bounds and constants that the family has.

    Example:
        >>> float(gated(jnp.array(0.0), jnp.array(3.0), Gate()))
        0.0
    """
    if spec.limit is not None:
        gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
    if spec.activation == "scaled_swish":
        return (up + spec.offset) * gate * jax.nn.sigmoid(spec.alpha * gate)
    if spec.activation not in ACTIVATIONS:
        raise JaxmoeError(f"activation {spec.activation!r}: jaxmoe runs {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[spec.activation](gate) * up


def run_experts(
    x: Float[Array, "token hidden"],
    chosen: Int[Array, "token choice"],
    experts: CompressedLayer,
    gate: Gate,
    biases: Mapping[str, Float[Array, "expert out"]],
    shape: BlockShape | None = None,
    probes: Mapping[str, Float[Array, "token choice out"]] | None = None,
    weights: Float[Array, "token choice"] | None = None,
) -> ExpertRows:
    """Run every token through its chosen experts.

    Args:
        x: the tokens as the experts see them.
        chosen: the experts of each token.
        experts: the layer's terms.
        gate: how gate and up are joined.
        biases: `gate`, `up` and `down` where the family has them, else empty.
        shape: of the blocks, chosen on the host from real counts; None takes what is enough for any routing.
        probes: added to the outputs of `gate`, `up` and `down`: a gradient with respect to zeros here is the gradient
            with respect to these outputs.
        weights: the router's, by which the outputs are combined; None weighs every choice by one. A term of `down` that
            chooses channels by what it reads sees the activations combined alike.

    Returns:
        Intermediate activations and outputs of every assignment, and the weighted sum; differentiable in `x` and in the
        floating-point numbers of `experts`.
    """
    if shape is None:
        rows = block_rows(chosen.size, experts.sizes.experts)
        shape = BlockShape(rows, most_blocks(chosen.size, experts.sizes.experts, rows))
    own, base = experts.split()
    intermediate, output = lax.platform_dependent(
        x,
        chosen,
        own,
        base.sums(x, ("gate", "up")),
        biases,
        probes or {},
        tpu=partial(_ragged, gate=gate),
        default=partial(_blocked, gate=gate, shape=shape),
    )

    def combine(rows):
        if weights is None:
            return jnp.sum(rows, 1)
        return jnp.einsum("tk,tko->to", weights.astype(rows.dtype), rows)

    entered, combined = combine(intermediate), combine(output)
    base = base.masked(entered, "down")
    for added in base.sums(intermediate, ("down",)).values():
        output = output + added
    for added in base.sums(entered, ("down",)).values():
        combined = combined + added
    return ExpertRows(intermediate, output, combined)


def _blocked(
    x, chosen, experts: CompressedLayer, once, biases, probes, *, gate: Gate, shape: BlockShape
) -> tuple[Array, Array]:
    blocks = arrange(chosen, experts.sizes.experts, shape)
    added = [{name: bias[blocks.expert][:, None].astype(x.dtype) for name, bias in biases.items()}]
    added.append({name: gather(probe, blocks) for name, probe in probes.items()})
    added.append({name: gather_tokens(rows, blocks) for name, rows in once.items()})
    intermediate, output = _network(gather_tokens(x, blocks), experts, gate, added, block_product(blocks))
    return scatter(intermediate, blocks), scatter(output, blocks)


def _ragged(x, chosen, experts: CompressedLayer, once, biases, probes, *, gate: Gate) -> tuple[Array, Array]:
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=experts.sizes.experts)
    token = order // chosen.shape[1]
    added = [{name: bias[flat[order]].astype(x.dtype) for name, bias in biases.items()}]
    added.append({name: probe.reshape(len(flat), -1)[order] for name, probe in probes.items()})
    added.append({name: rows[token] for name, rows in once.items()})
    intermediate, output = _network(x[token], experts, gate, added, ragged_product(counts))
    back = jnp.argsort(order).reshape(chosen.shape)
    return intermediate[back], output[back]


def _network(rows, experts: CompressedLayer, gate: Gate, added, product) -> tuple[Array, Array]:
    def run(rows, projections: tuple[str, ...], size: int) -> list[Array]:
        # All of a projection may be the same for all experts: then nothing of it is here.
        nothing = jnp.zeros((*rows.shape[:-1], size), rows.dtype)
        outputs = experts.sums(rows, projections, product)
        return [sum((own[name] for own in added if name in own), outputs.get(name, nothing)) for name in projections]

    first, second = run(rows, ("gate", "up"), experts.sizes.intermediate)
    intermediate = gated(first, second, gate)
    (output,) = run(intermediate, ("down",), experts.sizes.hidden)
    return intermediate, output
