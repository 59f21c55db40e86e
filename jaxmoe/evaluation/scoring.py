"""What a model says of the next token, without ever holding the logits of its whole vocabulary.

The head is applied to a block of the vocabulary at a time, and what has to be known of all logits z is carried from
block to block: the largest one, the target's, and the sum of exponentials that a softmax divides by. Of two models p
and q the divergence is found in the same walk:

    KL(p || q) = E_p[z_p - z_q] - log sum exp z_p + log sum exp z_q      (nats)

Memory: a block of the head in float32 and the logits of some tokens for it, whatever the vocabulary. The loop over
blocks is one of the host, so that the head may stay in its file; a caller jits the step.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.checkpoint.decoder import Rows
from jaxmoe.model.decoder import head
from jaxmoe.model.spec import DecoderSpec

BLOCK = 1024
"""Entries of the vocabulary that the head is applied to at a time: with as many tokens, logits that fit into caches."""


class Scores(NamedTuple):
    """The negative log-likelihood of the tokens that followed, in nats, and the tokens held for most likely."""

    nats: Float[Array, " token"]
    top: Int[Array, " token"]


class Comparison(NamedTuple):
    """The scores of a model, those of the original, and KL(original || model) in nats, for every token."""

    scores: Scores
    original: Scores
    divergence: Float[Array, " token"]


class Side(NamedTuple):
    """One model's end: the hidden states that leave its last layer, its arrays, perhaps on disk, and its spec."""

    x: Float[Array, "token hidden"]
    parameters: Mapping[str, Array | np.ndarray | Rows]
    spec: DecoderSpec

    def blocks(self, size: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield where each block of the vocabulary begins, and the head's arrays for it."""
        for first in range(0, self.spec.vocabulary, size):
            yield (
                first,
                {
                    name: array if name.startswith("norm.") else array[first : first + size]
                    for name, array in self.parameters.items()
                },
            )


class Seen(NamedTuple):
    """Of the logits seen so far: the largest, its token, the sum of exp(logit - largest), and the target's logit."""

    largest: Float[Array, " token"]
    top: Int[Array, " token"]
    total: Float[Array, " token"]
    target: Float[Array, " token"]


class Apart(NamedTuple):
    """What two models' logits have shown so far; `apart` is the sum of exp(z_p - largest) (z_p - z_q)."""

    seen: Seen
    original: Seen
    apart: Float[Array, " token"]


def score_block(seen: Seen, x, parameters, targets, first, *, spec: DecoderSpec) -> Seen:
    """Take the block of the vocabulary that begins at `first` into account."""
    return _fold(seen, head(x, parameters, spec), targets, first)


def compare_block(state: Apart, x, parameters, targets, first, *, spec: tuple[DecoderSpec, DecoderSpec]) -> Apart:
    """Take a block of the vocabulary into account; `x`, `parameters` and `spec` are those of model and original."""
    logits, others = (head(*own) for own in zip(x, parameters, spec, strict=True))
    before, after = state.original, _fold(state.original, others, targets, first)
    added = jnp.sum(jnp.exp(others - after.largest[:, None]) * (others - logits), -1)
    apart = state.apart * jnp.exp(before.largest - after.largest) + added
    return Apart(_fold(state.seen, logits, targets, first), after, apart)


def score(side: Side, targets: Int[AnyArray, " token"], *, block: int = BLOCK, step=score_block) -> Scores:
    """Score the tokens that follow.

    Args:
        side: the model's end.
        targets: the token that follows each.
        block: entries of the vocabulary that are worked on together.
        step: `score_block`, perhaps jitted with static `spec`.

    Example:
        >>> from jaxmoe.model.spec import DecoderSpec, Norm
        >>> spec = DecoderSpec(vocabulary=3, hidden=2, layers=(), norm=Norm())
        >>> ends = {"norm.weight": jnp.ones(2), "head.weight": jnp.zeros((3, 2))}
        >>> float(score(Side(jnp.ones((1, 2)), ends, spec), jnp.array([2]), block=2).nats[0])  # log 3
        1.0986...
    """
    seen = _nothing(targets)
    for first, parameters in side.blocks(block):
        seen = step(seen, side.x, parameters, targets, first, spec=side.spec)
    return _scores(seen)


def compare(
    side: Side, original: Side, targets: Int[AnyArray, " token"], *, block: int = BLOCK, step=compare_block
) -> Comparison:
    """Score the tokens that follow by two models of one vocabulary, and measure how far apart the models are.

    Args:
        side: the model's end.
        original: the end of the model that it is measured against, for the same tokens.
        targets: the token that follows each.
        block: entries of the vocabulary that are worked on together.
        step: `compare_block`, perhaps jitted with static `spec`.
    """
    state = Apart(_nothing(targets), _nothing(targets), jnp.zeros(targets.shape))
    for (first, own), (_, other) in zip(side.blocks(block), original.blocks(block), strict=True):
        state = step(state, (side.x, original.x), (own, other), targets, first, spec=(side.spec, original.spec))
    seen, other, apart = state
    divergence = apart / other.total - _log_sum(other) + _log_sum(seen)
    return Comparison(_scores(seen), _scores(other), divergence)


def _nothing(targets) -> Seen:
    zeros = jnp.zeros(targets.shape)
    return Seen(zeros - jnp.inf, jnp.zeros(targets.shape, targets.dtype), zeros, zeros)


def _fold(seen: Seen, logits, targets, first) -> Seen:
    """Take a block of the vocabulary into account, of equal logits the first as `argmax` does."""
    here = jnp.max(logits, -1)
    largest = jnp.maximum(seen.largest, here)
    within = targets - first
    inside = (within >= 0) & (within < logits.shape[1])
    own = jnp.take_along_axis(logits, jnp.where(inside, within, 0)[:, None], axis=1)[:, 0]
    # What `argmax` returns, which is many times slower on CPU.
    entries = jnp.arange(logits.shape[1], dtype=seen.top.dtype)
    top = first + jnp.min(jnp.where(logits == here[:, None], entries, logits.shape[1]), -1)
    return Seen(
        largest,
        jnp.where(here > seen.largest, top, seen.top),
        seen.total * jnp.exp(seen.largest - largest) + jnp.sum(jnp.exp(logits - largest[:, None]), -1),
        jnp.where(inside, own, seen.target),
    )


def _log_sum(seen: Seen):
    return seen.largest + jnp.log(seen.total)


def _scores(seen: Seen) -> Scores:
    return Scores(_log_sum(seen) - seen.target, seen.top)
