"""Diagonal Fisher information of the experts' matrices, from one layer's inputs and the gradient of its outputs.

With the loss of a sequence s, the mean negative log-likelihood of its counted tokens, and d = dloss/d(W x) at each
token, the gradient of the loss is sum_t d_t x_t', and

    "sequence":  sum_s (sum_t d_t x_t')^2        as the D2-MoE paper has it (arXiv 2502.17298)
    "token":     sum_t (d_t d_t) (x_t x_t)'      every token's part by itself: no products across tokens

element by element. One backward pass of the layer gives d for all tokens at once (`run_experts`' probes); the products
of each sequence and expert are then formed on their own, so that no gradient of a whole layer per sequence ever exists.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.model.decoder import head
from jaxmoe.model.layer import Intermediates, layer
from jaxmoe.model.spec import DecoderSpec, ExpertBlock, LayerSpec

Projections = dict[str, Array]


def sequence_loss(
    x: Float[AnyArray, "position hidden"],
    ids: Int[AnyArray, " position"],
    counted: Bool[AnyArray, " position"],
    parameters: Mapping[str, Any],
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
    x: Float[AnyArray, "sequence position hidden"],
    ids: Int[AnyArray, "sequence position"],
    counted: Bool[AnyArray, "sequence position"],
    parameters: Mapping[str, Any],
    spec: DecoderSpec,
) -> Float[Array, "sequence position hidden"]:
    """Return the gradient of every sequence's loss with respect to what leaves the last layer."""
    gradient = jax.grad(lambda x, ids, counted: sequence_loss(x, ids, counted, parameters, spec))
    # One sequence at a time: the logits of a batch may be larger than all the rest.
    return lax.map(lambda parts: gradient(*parts), (x, ids, counted))


def layer_backward(
    x: Float[AnyArray, "sequence position hidden"],
    gradient: Float[AnyArray, "sequence position hidden"],
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
        fisher = summed_squares(seen, deltas, block.shape.experts, sequences=x.shape[0], whole=mode == "sequence")
    return entered, fisher, seen


ROWS = (16, 32, 48, 64, 96, 128, 192, 256)
"""Rows of the products that are summed: the last for as long as there are more, then the first that holds the rest."""


def summed_squares(
    seen: Intermediates, deltas: Projections, experts: int, *, sequences: int, whole: bool
) -> Projections:
    """Return the sums of squared products of each projection, `[expert, out, in]`.

    Args:
        seen: what the layer's experts read, and which token chose them.
        deltas: gradients with respect to the outputs of the projections, `[token, choice, out]`.
        experts: how many there are.
        sequences: of equal length that the tokens belong to, one after the other.
        whole: whether the products of a sequence are added up before they are squared, or every token's is squared.
    """
    assert seen.routes is not None
    assert seen.intermediate is not None
    chosen = seen.routes.experts
    tokens, choices = chosen.shape
    if not whole:
        # Single tokens are squared before they are summed: it does not matter in which sequence they lie.
        sequences = 1
    # Assignments are sorted by expert and, within it, by sequence: a pair of both is what is squared.
    pairs = (chosen * sequences + (jnp.arange(tokens) // (tokens // sequences))[:, None]).reshape(-1)
    counts = jnp.bincount(pairs, length=experts * sequences)
    first = jnp.cumsum(counts) - counts
    (occupied,) = jnp.nonzero(counts, size=len(counts))
    # A token chooses an expert once.
    sizes = ROWS[: int(np.searchsorted(ROWS, tokens // sequences)) + 1]
    # Behind the last assignment stand numbers of none, whose rows are zeros.
    order = jnp.pad(jnp.argsort(pairs, stable=True), (0, sizes[-1]), constant_values=chosen.size)
    left = {name: delta.reshape(chosen.size, -1) for name, delta in deltas.items()}
    intermediate = seen.intermediate.reshape(chosen.size, -1)
    outputs = [name for name in deltas if name != "down"]
    ends = np.cumsum([left[name].shape[1] for name in outputs])

    def products(begin, end, size: int):
        """Multiply the assignments from `begin` to `end`, at most `size` of them, with what they read."""
        own = jnp.arange(size) < end - begin
        place = jnp.where(own, lax.dynamic_slice(order, (begin,), (size,)), chosen.size)
        rows = {name: array.at[place].get(mode="fill", fill_value=0) for name, array in left.items()}
        # Gate and up read the same rows: one product serves both.
        factors = {
            "first": (jnp.concatenate([rows[name] for name in outputs], -1), seen.inputs[place // choices]),
            "down": (rows["down"], intermediate[place]),
        }
        if not whole:
            factors = jax.tree.map(jnp.square, factors)
        return {name: jnp.einsum("to,ti->oi", *both, precision=lax.Precision.HIGHEST) for name, both in factors.items()}

    fitting = [partial(products, size=size) for size in sizes]

    def pair(position, totals):
        index = occupied[position]
        begin, end = first[index], first[index] + counts[index]
        full = (counts[index] - 1) // sizes[-1]
        last = begin + full * sizes[-1]
        sums = lax.switch(jnp.searchsorted(jnp.array(sizes), end - last), fitting, last, end)

        def further(chunk, sums):
            return jax.tree.map(jnp.add, sums, products(begin + chunk * sizes[-1], end, sizes[-1]))

        sums = lax.fori_loop(0, full, further, sums)
        if whole:
            sums = jax.tree.map(jnp.square, sums)
        split = dict(zip(outputs, jnp.split(sums["first"], ends[:-1]), strict=True)) | {"down": sums["down"]}
        return {name: total.at[index // sequences].add(split[name]) for name, total in totals.items()}

    totals = {
        name: jnp.zeros((experts, array.shape[1], (intermediate if name == "down" else seen.inputs).shape[1]))
        for name, array in left.items()
    }
    return lax.fori_loop(0, jnp.sum(counts > 0), pair, totals)
