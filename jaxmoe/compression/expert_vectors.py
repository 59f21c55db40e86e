"""Vectors that compensate for experts which do not run, learned layer by layer from what the layer gave when all ran.

For the tokens t of some text, with the vectors theta as the only unknowns, minimise

    sum_t | y_t - y_t(theta) |^2 / sum_t | y_t |^2

where y_t is the weighted sum of all experts of the token and y_t(theta) that of the main ones with scaled inputs. The
experts themselves stay as they are. Vectors start at one: the error then is that of leaving the auxiliary experts out.
Each step follows the gradient of one batch (Adam, the rate falling along a cosine). An expert that is never auxiliary
has no gradient and keeps its ones. This is not in the paper (arXiv 2503.00634), which trains the whole model.

What the experts read and gave lies in mapped files meanwhile: memory holds one batch, the files take twice what the
hidden states between two layers take, and the chosen experts.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxmoe.checkpoint.mapped import create_mapped
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.compressed_experts import Settings
from jaxmoe.model.compressed_experts import by_weight, ones
from jaxmoe.model.layer import Intermediates, routed
from jaxmoe.model.routing import Routes
from jaxmoe.model.spec import ExpertBlock, LayerSpec
from jaxmoe.streaming import HiddenStates, run_layer

CHECK = 50
"""Steps between two looks at the tokens that are set apart."""

APART = 10
"""One of so many tokens is set apart to test on."""

MOST_APART = 16_384
"""Tokens that are set apart at most."""

Vectors = dict[str, Array]


class Examples(NamedTuple):
    """What a layer's experts read and gave together when all chosen ones ran.

    Args:
        inputs: the tokens, as the router sees them.
        experts: those of each token, in descending order of their weights.
        weights: the router's.
        outputs: the weighted sums of the experts' outputs.
    """

    inputs: Float[Array | np.ndarray, "token hidden"]
    experts: Int[Array | np.ndarray, "token choice"]
    weights: Float[Array | np.ndarray, "token choice"]
    outputs: Float[Array | np.ndarray, "token hidden"]


class Learner(NamedTuple):
    """Where learning stands: the vectors, and the optimiser's memory."""

    vectors: Vectors
    memory: Any


def schedule(rate: float, steps: int) -> optax.GradientTransformation:
    """Return Adam with a rate that falls to nothing along a cosine."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)


def begin(block: ExpertBlock, optimizer: optax.GradientTransformation) -> Learner:
    """Return a learner whose vectors are ones."""
    vectors = ones(block.shape)
    return Learner(vectors, optimizer.init(vectors))


def squares(
    vectors: Mapping[str, Array], examples: Examples, parameters: Mapping[str, Any], block: ExpertBlock
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum of the squared errors and that of the squared outputs.

    Args:
        vectors: by their names, as `model.compressed_experts.ones` has them.
        examples: some tokens.
        parameters: of the layer; `experts`, and biases where it has them.
        block: how many experts run.
    """
    inputs, experts, weights, outputs = map(jnp.asarray, examples)
    found, _ = routed(inputs, Routes(experts, weights), {**parameters, **vectors}, block)
    return jnp.sum((found.combined - outputs) ** 2), jnp.sum(outputs**2)


def learn(
    learner: Learner,
    examples: Examples,
    parameters: Mapping[str, Any],
    block: ExpertBlock,
    optimizer: optax.GradientTransformation,
) -> tuple[Learner, Float[Array, ""]]:
    """Take one step, and return the relative squared error of the batch before it; arguments as of `squares`."""

    def loss(vectors):
        wrong, whole = squares(vectors, examples, parameters, block)
        return wrong / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)

    value, gradient = jax.value_and_grad(loss)(learner.vectors)
    updates, memory = optimizer.update(gradient, learner.memory)
    return Learner(jax.tree.map(jnp.add, learner.vectors, updates), memory), value


class Distilled(NamedTuple):
    """What became of a layer.

    vectors: by name; before, after: relative squared error of the layer's output on the tokens set apart, with ones
    and with the vectors; steps: taken; losses: that error at every check; never: experts that were never auxiliary.
    """

    vectors: Vectors
    before: float
    after: float
    steps: int
    losses: list[float]
    never: tuple[int, ...]


def distil(
    examples: Examples, parameters: dict[str, Any], block: ExpertBlock, settings: Settings, seed: tuple[int, int]
) -> Distilled:
    """Learn the vectors of one layer; those of the smallest error on the tokens set apart are kept.

    Args:
        examples: what the layer read and gave.
        parameters: its arrays, on the device.
        block: how many experts run.
        settings: of the learning.
        seed: of the order of the tokens, and the layer.
    """
    if len(examples.inputs) < APART:
        raise JaxmoeError(f"{len(examples.inputs)} tokens to learn from: give at least {APART}, better {100 * APART:,}")
    random = np.random.default_rng(seed)
    order = random.permutation(len(examples.inputs))
    apart = min(len(order) // APART, MOST_APART)
    test, rest = order[:apart], order[apart:]
    size = min(settings.batch, len(rest))
    learner = begin(block, schedule(settings.rate, settings.steps))
    parameters = {name: array for name, array in parameters.items() if name.startswith("experts")}
    auxiliary = np.asarray(examples.experts[rest])[:, block.running :]
    never = np.setdiff1d(np.arange(block.shape.experts), auxiliary)

    def error(learner: Learner) -> float:
        sums = [_squares(learner.vectors, own, parameters, block) for own in batches(examples, test, min(size, apart))]
        wrong, whole = np.sum(np.asarray(sums, np.float64), 0)
        return float(wrong / whole) if whole > 0 else 0.0

    best, losses, stale, steps = learner, [error(learner)], 0, 0
    lesson = iter(())
    while steps < settings.steps and stale < settings.patience:
        own = next(lesson, None)
        if own is None:
            lesson = batches(examples, random.permutation(rest), size)
            continue
        learner, _ = _learn(learner, own, parameters, block, (settings.rate, settings.steps))
        steps += 1
        if steps % CHECK == 0 or steps == settings.steps:
            losses.append(error(learner))
            better = losses[-1] < min(losses[:-1])
            best, stale = (learner, 0) if better else (best, stale + 1)
    return Distilled(best.vectors, losses[0], min(losses), steps, losses, tuple(never.tolist()))


@partial(jax.jit, static_argnames="block")
def _squares(vectors, examples, parameters, block):
    with jax.default_matmul_precision("float32"):
        return squares(vectors, examples, parameters, block)


@partial(jax.jit, static_argnames=("block", "rule"))
def _learn(learner, examples, parameters, block, rule):
    with jax.default_matmul_precision("float32"):
        return learn(learner, examples, parameters, block, schedule(*rule))


def observe(
    index: int,
    parameters: dict[str, Any],
    spec: LayerSpec,
    states: HiddenStates,
    out: np.ndarray | None,
    counted: np.ndarray,
) -> Examples:
    """Move all states through a layer, and return what its experts read and gave at the tokens that count.

    Args:
        index: of the layer.
        parameters: its arrays, on the device.
        spec: what it computes, all chosen experts running.
        states: of which those at `index` are read.
        out: see `streaming.run_layer`.
        counted: which tokens count, `[window, position]`.
    """
    tokens = int(counted.sum())
    kept: Examples | None = None
    begin = 0
    for step in run_layer(index, parameters, spec, states, out, observe=_EXAMPLES):
        rows = counted[step.windows].reshape(-1)
        batch = [np.asarray(array)[rows] for array in step.observed]
        if kept is None:
            kept = Examples(*(_file(states.folder, tokens, own) for own in batch))
        end = begin + len(batch[0])
        for whole, own in zip(kept, batch):
            whole[begin:end] = own
        begin = end
    assert kept is not None
    return kept


def batches(examples: Examples, order: np.ndarray, size: int) -> Iterator[Examples]:
    """Yield full batches of some tokens in the order of their numbers; the last tokens fill none and are left out."""
    for begin in range(0, len(order) - size + 1, size):
        # Sorted, for the sake of the disk: within a batch the order does not matter.
        yield Examples(*(array[np.sort(order[begin : begin + size])] for array in examples))


def _examples(seen: Intermediates, extra: None) -> Examples:
    assert seen.routes is not None
    assert seen.outputs is not None
    routes = by_weight(seen.routes)
    outputs = jnp.einsum("tk,tkh->th", seen.routes.weights, seen.outputs)
    return Examples(seen.inputs, routes.experts, routes.weights, outputs)


_EXAMPLES = jax.tree_util.Partial(_examples)


def _file(folder: Path, tokens: int, like: np.ndarray) -> np.ndarray:
    return create_mapped(folder, like.dtype.name, (tokens, *like.shape[1:]), named=False)


def importance(examples: Examples, experts: int, main: int) -> dict[str, Any]:
    """Return the shares of a layer's router weights.

    Args:
        examples: what the layer's router chose, best first.
        experts: how many there are.
        main: how many of a token's experts run.

    Returns:
        `by_rank`: the share of the best expert of each token, of the second best, and so on, which sum to one; `main`
        and `auxiliary`: what each expert carries where it is one or the other, which together do.

    Example:
        >>> chosen, weights = np.array([[0, 1], [1, 0]]), np.array([[0.75, 0.25], [0.5, 0.5]])
        >>> importance(Examples(chosen, chosen, weights, chosen), 2, 1)
        {'by_rank': [0.625, 0.375], 'main': [0.375, 0.25], 'auxiliary': [0.25, 0.125]}
    """
    weights = np.asarray(examples.weights, np.float64)
    whole = weights.sum()

    def shares(part: slice) -> list[float]:
        chosen = np.asarray(examples.experts)[:, part].reshape(-1)
        return (np.bincount(chosen, weights[:, part].reshape(-1), minlength=experts) / whole).tolist()

    return {
        "by_rank": (weights.sum(0) / whole).tolist(),
        "main": shares(slice(main)),
        "auxiliary": shares(slice(main, None)),
    }
