"""The routed experts of one layer, run as they are stored: dense, low-rank or as mixtures of bases.

    f_e(x) = down_e ( activation(gate_e x) * (up_e x) ),        y = sum_k w_k f_k(x)

Every term is applied to the rows of its experts without forming the dense matrices. A term whose matrix B is the same
for all experts is applied once for every token, however many experts the token has: for gate and up before the token
goes to its experts, and for down behind their weighted sum,

    sum_k w_k (W_k + B) h_k  =  sum_k w_k W_k h_k  +  B sum_k w_k h_k

Where the inputs of the projections are scaled token by token (`compressed_experts.py`), that still holds.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, CompressedLayer
from jaxmoe.factors.term import per_expert
from jaxmoe.model.blocked import (
    BlockShape,
    arrange,
    block_product,
    block_rows,
    gather_tokens,
    gather_zeros,
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
    """What the chosen experts did with every token: what down reads, outputs before any weight, and their weighted sum.

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
    x: Float[AnyArray, "token hidden"],
    chosen: Int[AnyArray, "token choice"],
    experts: CompressedLayer,
    gate: Gate,
    biases: Mapping[str, Float[AnyArray, "expert _"]],
    shape: BlockShape | None = None,
    probes: Mapping[str, Float[AnyArray, "token choice _"]] | None = None,
    weights: Float[AnyArray, "token choice"] | None = None,
    scales: Mapping[str, Float[AnyArray, "token _"]] | None = None,
) -> ExpertRows:
    """Run every token through its chosen experts.

    Args:
        x: the tokens as the experts see them.
        chosen: the experts of each token.
        experts: the layer's terms.
        gate: how gate and up are joined.
        biases: `gate`, `up` and `down` where the family has them, else empty.
        shape: of the blocks, chosen on the host from real counts; None takes what is enough for any routing.
        probes: zeros, added to the outputs of `gate`, `up` and `down`: a gradient with respect to them is the gradient
            with respect to these outputs.
        weights: the router's, by which the outputs are combined; None weighs every choice by one. A term of `down` that
            chooses channels by what it reads sees the activations combined alike.
        scales: factors of what `gate`, `up` and `down` read, token by token; None for ones. Gate and up then read
            different rows, so that terms of both are applied twice.

    Returns:
        Intermediate activations and outputs of every assignment, and the weighted sum; differentiable in `x` and in the
        floating-point numbers of `experts`.
    """
    if shape is None:
        rows = block_rows(chosen.size, experts.sizes.experts)
        shape = BlockShape(rows, most_blocks(chosen.size, experts.sizes.experts, rows))
    own, base = experts.split()
    scales = {} if scales is None else {name: scale.astype(x.dtype) for name, scale in scales.items()}
    reads = {name: x * scales[name] for name in ("gate", "up") if name in scales} or {"gate_up": x}
    intermediate, output = lax.platform_dependent(
        reads,
        {name: scale for name, scale in scales.items() if name == "down"},
        chosen,
        own,
        _sums(base, reads),
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


def _sums(layer: CompressedLayer, reads: Mapping[str, AnyArray], product=per_expert) -> dict[str, Array]:
    """Multiply by gate and up, which read the rows of their own or those of both (`gate_up`)."""
    sums: dict[str, Array] = {}
    for target, rows in reads.items():
        sums |= layer.sums(rows, TARGETS[target], product)
    return sums


def _blocked(
    reads, scales, chosen, experts: CompressedLayer, once, biases, probes, *, gate: Gate, shape: BlockShape
) -> tuple[Array, Array]:
    blocks = arrange(chosen, experts.sizes.experts, shape)
    dtype = next(iter(reads.values())).dtype
    added = [{name: bias[blocks.expert][:, None].astype(dtype) for name, bias in biases.items()}]
    added.append({name: gather_zeros(probe, blocks) for name, probe in probes.items()})
    added.append({name: gather_tokens(rows, blocks) for name, rows in once.items()})
    reads, scales = ({name: gather_tokens(rows, blocks) for name, rows in part.items()} for part in (reads, scales))
    intermediate, output = _network(reads, scales, experts, gate, added, block_product(blocks))
    return scatter(intermediate, blocks), scatter(output, blocks)


def _ragged(
    reads, scales, chosen, experts: CompressedLayer, once, biases, probes, *, gate: Gate
) -> tuple[Array, Array]:
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=experts.sizes.experts)
    token = order // chosen.shape[1]
    dtype = next(iter(reads.values())).dtype
    added = [{name: bias[flat[order]].astype(dtype) for name, bias in biases.items()}]
    added.append({name: probe.reshape(len(flat), -1)[order] for name, probe in probes.items()})
    added.append({name: rows[token] for name, rows in once.items()})
    reads, scales = ({name: rows[token] for name, rows in part.items()} for part in (reads, scales))
    intermediate, output = _network(reads, scales, experts, gate, added, ragged_product(counts))
    back = jnp.argsort(order).reshape(chosen.shape)
    return intermediate[back], output[back]


def _network(reads, scales, experts: CompressedLayer, gate: Gate, added, product) -> tuple[Array, Array]:
    def whole(name: str, outputs: Mapping[str, Array], like: Array, size: int) -> Array:
        # All of a projection may be the same for all experts: then nothing of it is here.
        nothing = jnp.zeros((*like.shape[:-1], size), like.dtype)
        return sum((own[name] for own in added if name in own), outputs.get(name, nothing))

    outputs, like = _sums(experts, reads, product), next(iter(reads.values()))
    first, second = (whole(name, outputs, like, experts.sizes.intermediate) for name in ("gate", "up"))
    intermediate = gated(first, second, gate)
    if "down" in scales:
        intermediate = intermediate * scales["down"]
    outputs = experts.sums(intermediate, ("down",), product)
    return intermediate, whole("down", outputs, intermediate, experts.sizes.hidden)
