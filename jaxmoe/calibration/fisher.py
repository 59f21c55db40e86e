"""Diagonal Fisher information of the experts' matrices, from one layer's inputs and the gradient of its outputs.

With the loss of a sequence s, the mean negative log-likelihood of its counted tokens, and d = dloss/d(W x) at each
token, the gradient of the loss is sum_t d_t x_t', and

    "sequence":  sum_s (sum_t d_t x_t')^2        as the D2-MoE paper has it (arXiv 2502.17298)
    "token":     sum_t (d_t d_t) (x_t x_t)'      every token's part by itself: no products across tokens

element by element. One backward pass of the layer gives d for all tokens at once (`run_experts`' probes); the products
of each sequence and expert are then formed on their own, so that no gradient of a whole layer per sequence ever exists.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.model.decoder import head
from jaxmoe.model.grouped import BlockShape, arrange, block_rows, most_blocks
from jaxmoe.model.layer import Intermediates, layer
from jaxmoe.model.spec import DecoderSpec, ExpertBlock, LayerSpec

Projections = dict[str, Array]


def sequence_losses(
    x: Float[Array, "sequence position hidden"],
    ids: Int[Array, "sequence position"],
    counted: Bool[Array, "sequence position"],
    parameters: Mapping[str, Array],
    spec: DecoderSpec,
) -> Float[Array, " sequence"]:
    """Return each sequence's mean negative log-likelihood, in nats, of its counted tokens given those before them.

    Args:
        x: hidden states that leave the last layer.
        ids: the tokens.
        counted: which of them count; the first of a sequence never does.
        parameters: of the decoder's ends.
        spec: of the decoder.
    """

    # The logits of one sequence at a time: those of a batch may be larger than all the rest.
    @jax.checkpoint
    def one(parts):
        x, ids, counted = parts
        logits = jax.nn.log_softmax(head(x[:-1], parameters, spec).astype(jnp.float32))
        losses = -jnp.take_along_axis(logits, ids[1:, None], axis=-1)[:, 0]
        wanted = counted[1:]
        return jnp.sum(jnp.where(wanted, losses, 0)) / jnp.maximum(1, jnp.sum(wanted))

    return lax.map(one, (x, ids, counted))


def layer_backward(
    x: Float[Array, "sequence position hidden"],
    gradient: Float[Array, "sequence position hidden"],
    parameters: Mapping[str, Any],
    spec: LayerSpec,
    *,
    mode: str,
) -> tuple[Float[Array, "sequence position hidden"], Projections, Intermediates]:
    """Walk back through one layer.

    Args:
        x: hidden states that entered the layer.
        gradient: of the sequences' losses with respect to those that left it.
        parameters: of the layer.
        spec: of the layer.
        mode: "sequence" or "token".

    Returns:
        The gradient with respect to `x`; the Fisher information of each projection, empty in a layer without experts;
        and what the forward pass saw.
    """
    block = spec.feed_forward
    probes: Projections = {}
    if isinstance(block, ExpertBlock):
        tokens, sizes = x.shape[0] * x.shape[1], block.shape
        probes = {
            name: jnp.zeros((tokens, block.router.top_k, sizes.hidden if name == "down" else sizes.intermediate))
            for name in sizes.projections
        }
    _, back, seen = jax.vjp(lambda x, probes: layer(x, parameters, spec, probes=probes), x, probes, has_aux=True)
    entered, deltas = back(gradient)
    fisher = {}
    if isinstance(block, ExpertBlock):
        fisher = _squares(seen, deltas, block.shape.experts, sequences=x.shape[0], whole=mode == "sequence")
    return entered, fisher, seen


def _squares(seen: Intermediates, deltas: Projections, experts: int, *, sequences: int, whole: bool) -> Projections:
    """Return the sums of squared products, of whole sequences or of single tokens, `[expert, out, in]`."""
    assert seen.routes is not None
    assert seen.intermediate is not None
    chosen = seen.routes.experts
    tokens, choices = chosen.shape
    # Assignments are sorted by expert and, within it, by sequence: a pair of both is what is squared.
    pairs = chosen * sequences + (jnp.arange(tokens) // (tokens // sequences))[:, None]
    rows = block_rows(chosen.size, experts * sequences)
    blocks = arrange(pairs, experts * sequences, BlockShape(rows, most_blocks(chosen.size, experts * sequences, rows)))
    counts = jnp.bincount(pairs.reshape(-1), length=experts * sequences)
    needed = -(-counts // rows)
    first = jnp.cumsum(needed) - needed
    intermediate = seen.intermediate.reshape(chosen.size, -1)
    flat = {name: delta.reshape(chosen.size, -1) for name, delta in deltas.items()}

    def product(index, sums):
        place = blocks.assignment[index]
        real = (place < chosen.size)[:, None]
        place = jnp.minimum(place, chosen.size - 1)
        inputs = {"down": intermediate[place], "other": seen.inputs[place // choices]}

        def one(name):
            left, right = jnp.where(real, flat[name][place], 0), inputs.get(name, inputs["other"])
            if not whole:
                left, right = jnp.square(left), jnp.square(right)
            return jnp.einsum("to,ti->oi", left, right, precision=lax.Precision.HIGHEST)

        return {name: total + one(name) for name, total in sums.items()}

    def pair(index, totals):
        empty = {name: jnp.zeros(total.shape[1:]) for name, total in totals.items()}
        sums = lax.fori_loop(first[index], first[index] + needed[index], product, empty)
        expert = index // sequences
        return {
            name: total.at[expert].add(jnp.square(sums[name]) if whole else sums[name])
            for name, total in totals.items()
        }

    totals = {
        name: jnp.zeros((experts, delta.shape[-1], (intermediate if name == "down" else seen.inputs).shape[-1]))
        for name, delta in deltas.items()
    }
    return lax.fori_loop(0, experts * sequences, pair, totals)
