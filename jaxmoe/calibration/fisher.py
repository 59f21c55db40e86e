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
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.model.decoder import head
from jaxmoe.model.grouped import BlockShape, arrange, most_blocks, summed_rows
from jaxmoe.model.layer import Intermediates, layer
from jaxmoe.model.spec import DecoderSpec, ExpertBlock, LayerSpec

Projections = dict[str, Array]


def sequence_loss(
    x: Float[Array, "position hidden"],
    ids: Int[Array, " position"],
    counted: Bool[Array, " position"],
    parameters: Mapping[str, Array],
    spec: DecoderSpec,
) -> Float[Array, ""]:
    """Return the mean negative log-likelihood, in nats, of a sequence's counted tokens given those before them.

    Args:
        x: hidden states that leave the last layer.
        ids: the tokens.
        counted: which of them count; the first never does.
        parameters: of the decoder's ends.
        spec: of the decoder.
    """
    logits = jax.nn.log_softmax(head(x[:-1], parameters, spec).astype(jnp.float32))
    losses = -jnp.take_along_axis(logits, ids[1:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(counted[1:], losses, 0)) / jnp.maximum(1, jnp.sum(counted[1:]))


def loss_gradients(
    x: Float[Array, "sequence position hidden"],
    ids: Int[Array, "sequence position"],
    counted: Bool[Array, "sequence position"],
    parameters: Mapping[str, Array],
    spec: DecoderSpec,
) -> Float[Array, "sequence position hidden"]:
    """Return the gradient of every sequence's loss with respect to what leaves the last layer."""
    gradient = jax.grad(lambda x, ids, counted: sequence_loss(x, ids, counted, parameters, spec))
    # One sequence at a time: the logits of a batch may be larger than all the rest.
    return lax.map(lambda parts: gradient(*parts), (x, ids, counted))


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
    if not whole:
        # Single tokens are squared before they are summed: it does not matter in which sequence they lie.
        sequences = 1
    # Assignments are sorted by expert and, within it, by sequence: a pair of both is what is squared.
    pairs = chosen * sequences + (jnp.arange(tokens) // (tokens // sequences))[:, None]
    numbers = seen.inputs.shape[1] * seen.intermediate.shape[2]
    rows = max(32, summed_rows(chosen.size, experts * sequences, numbers))
    blocks = arrange(pairs, experts * sequences, BlockShape(rows, most_blocks(chosen.size, experts * sequences, rows)))
    counts = jnp.bincount(pairs.reshape(-1), length=experts * sequences)
    needed = -(-counts // rows)
    first = jnp.cumsum(needed) - needed
    (occupied,) = jnp.nonzero(counts, size=len(counts))
    left = {name: delta.reshape(chosen.size, -1) for name, delta in deltas.items()}
    intermediate = seen.intermediate.reshape(chosen.size, -1)
    outputs = [name for name in deltas if name != "down"]
    ends = np.cumsum([left[name].shape[1] for name in outputs])

    def product(index):
        place = blocks.assignment[index]
        # Rows of padding lie behind the last one.
        rows = {name: array.at[place].get(mode="fill", fill_value=0) for name, array in left.items()}
        # Gate and up read the same rows: one product serves both.
        factors = {
            "first": (jnp.concatenate([rows[name] for name in outputs], -1), seen.inputs[place // choices]),
            "down": (rows["down"], intermediate[place]),
        }
        if not whole:
            factors = jax.tree.map(jnp.square, factors)
        products = {
            name: jnp.einsum("to,ti->oi", *both, precision=lax.Precision.HIGHEST) for name, both in factors.items()
        }
        split = jnp.split(products["first"], ends[:-1])
        return {**dict(zip(outputs, split, strict=True)), "down": products["down"]}

    def pair(position, totals):
        index = occupied[position]
        begin = first[index]

        def further(index, sums):
            return jax.tree.map(jnp.add, sums, product(index))

        sums = lax.fori_loop(begin + 1, begin + needed[index], further, product(begin))
        if whole:
            sums = jax.tree.map(jnp.square, sums)
        return {name: total.at[index // sequences].add(sums[name]) for name, total in totals.items()}

    totals = {
        name: jnp.zeros((experts, array.shape[1], (intermediate if name == "down" else seen.inputs).shape[1]))
        for name, array in left.items()
    }
    return lax.fori_loop(0, jnp.sum(counts > 0), pair, totals)
