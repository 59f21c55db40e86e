"""The routed experts of one layer, run as they are stored: dense, low-rank or as mixtures of bases.

    f_e(x) = down_e ( activation(gate_e x) * (up_e x) )

Every term is applied to the rows of its experts without forming the dense matrices.
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
    """What the chosen experts did with every token: intermediate activations, and outputs before any weight."""

    intermediate: Float[Array, "token choice intermediate"]
    output: Float[Array, "token choice hidden"]


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

    Returns:
        Intermediate activations and outputs of every assignment; differentiable in `x` and `experts`.
    """
    if shape is None:
        rows = block_rows(chosen.size, experts.sizes.experts)
        shape = BlockShape(rows, most_blocks(chosen.size, experts.sizes.experts, rows))
    return lax.platform_dependent(
        x,
        chosen,
        experts,
        biases,
        probes or {},
        tpu=partial(_ragged, gate=gate),
        default=partial(_blocked, gate=gate, shape=shape),
    )


def _blocked(x, chosen, experts: CompressedLayer, biases, probes, *, gate: Gate, shape: BlockShape) -> ExpertRows:
    blocks = arrange(chosen, experts.sizes.experts, shape)
    added = [{name: bias[blocks.expert][:, None].astype(x.dtype) for name, bias in biases.items()}]
    added.append({name: gather(probe, blocks) for name, probe in probes.items()})
    results = _network(gather_tokens(x, blocks), experts, gate, added, block_product(blocks))
    return ExpertRows(*(scatter(result, blocks) for result in results))


def _ragged(x, chosen, experts: CompressedLayer, biases, probes, *, gate: Gate) -> ExpertRows:
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=experts.sizes.experts)
    added = [{name: bias[flat[order]].astype(x.dtype) for name, bias in biases.items()}]
    added.append({name: probe.reshape(len(flat), -1)[order] for name, probe in probes.items()})
    results = _network(x[order // chosen.shape[1]], experts, gate, added, ragged_product(counts))
    back = jnp.argsort(order).reshape(chosen.shape)
    return ExpertRows(*(result[back] for result in results))


def _network(rows, experts: CompressedLayer, gate: Gate, added, product) -> tuple[Array, Array]:
    def run(rows, projections: tuple[str, ...]) -> list[Array]:
        outputs = experts.apply(rows, projections, product)
        return [sum((own[name] for own in added if name in own), out) for name, out in zip(projections, outputs)]

    first, second = run(rows, ("gate", "up"))
    intermediate = gated(first, second, gate)
    (output,) = run(intermediate, ("down",))
    return intermediate, output
