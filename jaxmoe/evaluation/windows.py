"""Windows of tokens through a stored model, from ids to what it says of every token that follows.

Layers are streamed, the head is applied to some tokens at a time; the hidden states lie in files without names.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError
from jaxmoe.evaluation.scoring import Comparison, Scores, Side, compare, compare_block, score, score_block
from jaxmoe.report.events import Forward, OnEvent, ignore
from jaxmoe.streaming import TOKENS, TemporaryStates, stream

ROWS = 1024
"""Tokens that the head is applied to together."""


class Walked(NamedTuple):
    """A model, and the hidden states that left its last layer, `[window, position, hidden]`."""

    model: StoredModel
    x: np.ndarray


def walk(model: StoredModel, ids: np.ndarray, *, work: Path | None = None, on_event: OnEvent = ignore) -> Walked:
    """Move windows of tokens through all layers of a model.

    Args:
        model: on disk.
        ids: `[window, position]`; each window stands alone.
        work: folder on whose disk the hidden states of two layers lie; that for temporary files if None.
        on_event: called with a small record after every layer.

    Raises:
        JaxmoeError: activations are not finite, or the disk is full.
    """
    batch = _even(len(ids), max(1, TOKENS // ids.shape[1]))
    # Windows are repeated to fill the last batch, so that one program does for all.
    filled = np.pad(ids, ((0, -len(ids) % batch), (0, 0)), mode="edge")
    states = TemporaryStates(filled, model.spec.hidden, work=work, tokens=batch * ids.shape[1])
    total = len(model.spec.layers)
    for index, step in stream(model, states):
        if step.windows.stop == len(filled):
            on_event(Forward(model=model.folder.name, done=index + 1, total=total))
    return Walked(model, states.open(total)[: len(ids)])


def _even(count: int, most: int) -> int:
    """Return the size of as few batches as possible that are nearly full.

    Example:
        >>> _even(60, 16), _even(17, 16)
        (15, 9)
    """
    batches = -(-count // most)
    return -(-count // batches)


def score_windows(walked: Walked, ids: np.ndarray) -> Scores:
    """Score every token of the windows but the first of each.

    Args:
        walked: the model after its last layer.
        ids: the windows, `[window, position]`.

    Returns:
        Scores, `[window, position - 1]`: those at p are of the token at p + 1.

    Raises:
        JaxmoeError: logits are not finite.
    """
    scores = _in_chunks(partial(score_rows, walked.model), ids, walked.x)
    check_finite(walked.model, scores.nats)
    return scores


def compare_windows(walked: Walked, original: Walked, ids: np.ndarray) -> Comparison:
    """Score every token of the windows but the first of each by two models, and measure how far apart they are.

    Args:
        walked: the model after its last layer.
        original: the model that it is compared with.
        ids: the windows, `[window, position]`.

    Raises:
        JaxmoeError: logits are not finite, or the vocabularies differ.
    """
    sides = walked.model, original.model
    if sides[0].spec.vocabulary != sides[1].spec.vocabulary:
        raise JaxmoeError(
            f"{sides[0].folder} has {sides[0].spec.vocabulary} token ids and {sides[1].folder} has"
            f" {sides[1].spec.vocabulary}: their divergence is undefined; compare a model with its own original"
        )
    comparison = _in_chunks(partial(_compare_rows, *sides), ids, walked.x, original.x)
    for model, scores in zip(sides, (comparison.scores, comparison.original), strict=True):
        check_finite(model, scores.nats)
    return comparison


def check_finite(model: StoredModel, nats: ArrayLike) -> None:
    """Raise if the scores of a model are not finite."""
    finite = np.isfinite(nats)
    if bad := int(np.sum(~finite)):
        raise JaxmoeError(
            f"{model.folder}: NaN or infinite logits at {bad} of {finite.size} tokens: the head or the last"
            " normalisation is damaged; fetch or write the checkpoint again"
        )


def score_rows(model: StoredModel, targets: Array, x: Array) -> Scores:
    """Score some tokens, `[token]`, by the hidden states that left the last layer before each, `[token, hidden]`."""
    return score(Side(x, model.head(), model.spec), targets, step=_one_by_one(_score))


def _compare_rows(model: StoredModel, original: StoredModel, targets: Array, x: Array, other: Array) -> Comparison:
    sides = Side(x, model.head(), model.spec), Side(other, original.head(), original.spec)
    return compare(*sides, targets, step=_one_by_one(_compare))


def _one_by_one(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step that waits for its result: blocks of the head would pile up in memory before it."""
    return lambda *args, **kwargs: jax.block_until_ready(step(*args, **kwargs))


def _in_chunks(run: Callable[..., Any], ids: np.ndarray, *states: np.ndarray) -> Any:
    """Apply `run(targets, *rows)` to some tokens at a time, and return its results as `[window, position - 1]`."""
    targets = np.roll(ids, -1, axis=1).reshape(-1)
    flat = [x.reshape(-1, x.shape[-1]) for x in states]
    size = min(ROWS, len(targets))
    results = []
    for begin in range(0, len(targets), size):
        # The last chunk is filled up, so that one program does for all.
        parts = [x[begin : begin + size] for x in (targets, *flat)]
        own = len(parts[0])
        if own < size:
            parts = [np.pad(x, [(0, size - own), *[(0, 0)] * (x.ndim - 1)]) for x in parts]
        result = run(*map(jnp.asarray, parts))
        results.append(jax.tree.map(lambda x, own=own: np.asarray(x)[:own], result))
    return jax.tree.map(lambda *parts: np.concatenate(parts).reshape(ids.shape)[:, :-1], *results)


@partial(jax.jit, static_argnames="spec")
def _score(seen, x, parameters, targets, first, *, spec):
    with jax.default_matmul_precision("float32"):
        return score_block(seen, x, parameters, targets, first, spec=spec)


@partial(jax.jit, static_argnames="spec")
def _compare(state, x, parameters, targets, first, *, spec):
    with jax.default_matmul_precision("float32"):
        return compare_block(state, x, parameters, targets, first, spec=spec)
