"""What a model says of the next token, without ever holding the logits of its whole vocabulary.

The head is applied to a block of the vocabulary at a time, and what has to be known of all logits z is carried from
block to block: the largest one, the target's, and the sum of exponentials that a softmax divides by. Of two models p
and q the divergence is found in the same walk:

    KL(p || q) = E_p[z_p - z_q] - log sum exp z_p + log sum exp z_q      (nats)

Memory: a block of the head in float32 and the logits of some tokens for it, whatever the vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe.model.decoder import head
from jaxmoe.model.spec import DecoderSpec

BLOCK = 1024
"""Entries of the vocabulary that the head is applied to at a time: with as many tokens, logits that fit into caches."""

State = TypeVar("State")


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
    """One model's end: the hidden states that leave its last layer, its arrays, and its spec."""

    x: Float[Array, "token hidden"]
    parameters: Mapping[str, Array]
    spec: DecoderSpec


class _Seen(NamedTuple):
    """Of the logits seen so far: the largest, its token, the sum of exp(logit - largest), and the target's logit."""

    largest: Float[Array, " token"]
    top: Int[Array, " token"]
    total: Float[Array, " token"]
    target: Float[Array, " token"]


def score(side: Side, targets: Int[Array, " token"], *, block: int = BLOCK) -> Scores:
    """Score the tokens that follow.

    Args:
        side: the model's end.
        targets: the token that follows each.
        block: entries of the vocabulary that are worked on together.

    Example:
        >>> from jaxmoe.model.spec import DecoderSpec, Norm
        >>> spec = DecoderSpec(vocabulary=3, hidden=2, layers=(), norm=Norm())
        >>> ends = {"norm.weight": jnp.ones(2), "head.weight": jnp.zeros((3, 2))}
        >>> float(score(Side(jnp.ones((1, 2)), ends, spec), jnp.array([2]), block=2).nats[0])  # log 3
        1.0986...
    """

    def fold(seen: _Seen, first, size: int) -> _Seen:
        return _fold(seen, _logits(side, first, size), targets, first)

    return _scores(_over_vocabulary(fold, _nothing(targets), side.spec.vocabulary, block))


def compare(side: Side, original: Side, targets: Int[Array, " token"], *, block: int = BLOCK) -> Comparison:
    """Score the tokens that follow by two models of one vocabulary, and measure how far apart the models are.

    Args:
        side: the model's end.
        original: the end of the model that it is measured against, for the same tokens.
        targets: the token that follows each.
        block: entries of the vocabulary that are worked on together.
    """

    def fold(state, first, size: int):
        seen, before, apart = state
        logits, others = _logits(side, first, size), _logits(original, first, size)
        after = _fold(before, others, targets, first)
        added = jnp.sum(jnp.exp(others - after.largest[:, None]) * (others - logits), -1)
        apart = apart * jnp.exp(before.largest - after.largest) + added
        return _fold(seen, logits, targets, first), after, apart

    begin = _nothing(targets), _nothing(targets), jnp.zeros(targets.shape)
    seen, other, apart = _over_vocabulary(fold, begin, side.spec.vocabulary, block)
    divergence = apart / other.total - _log_sum(other) + _log_sum(seen)
    return Comparison(_scores(seen), _scores(other), divergence)


def _over_vocabulary(fold: Callable[..., State], state: State, vocabulary: int, block: int) -> State:
    blocks, rest = divmod(vocabulary, block)
    if blocks:
        state, _ = lax.scan(lambda s, first: (fold(s, first, block), None), state, jnp.arange(blocks) * block)
    return fold(state, blocks * block, rest) if rest else state


def _logits(side: Side, first, size: int):
    """Return the logits of `size` entries of the vocabulary, `[token, entry]`."""

    def rows(name: str, array: Array) -> Array:
        return array if name.startswith("norm.") else lax.dynamic_slice_in_dim(array, first, size)

    return head(side.x, {name: rows(name, array) for name, array in side.parameters.items()}, side.spec)


def _nothing(targets) -> _Seen:
    zeros = jnp.zeros(targets.shape)
    return _Seen(zeros - jnp.inf, jnp.zeros(targets.shape, targets.dtype), zeros, zeros)


def _fold(seen: _Seen, logits, targets, first) -> _Seen:
    """Take a block of the vocabulary into account, of equal logits the first as `argmax` does."""
    here = jnp.max(logits, -1)
    largest = jnp.maximum(seen.largest, here)
    within = targets - first
    inside = (within >= 0) & (within < logits.shape[1])
    own = jnp.take_along_axis(logits, jnp.where(inside, within, 0)[:, None], axis=1)[:, 0]
    # What `argmax` returns, which is many times slower on CPU.
    entries = jnp.arange(logits.shape[1], dtype=seen.top.dtype)
    top = first + jnp.min(jnp.where(logits == here[:, None], entries, logits.shape[1]), -1)
    return _Seen(
        largest,
        jnp.where(here > seen.largest, top, seen.top),
        seen.total * jnp.exp(seen.largest - largest) + jnp.sum(jnp.exp(logits - largest[:, None]), -1),
        jnp.where(inside, own, seen.target),
    )


def _log_sum(seen: _Seen):
    return seen.largest + jnp.log(seen.total)


def _scores(seen: _Seen) -> Scores:
    return Scores(_log_sum(seen) - seen.target, seen.top)
