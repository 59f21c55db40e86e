"""One layer's vectors, learned from its examples: which tokens teach and which test, when to stop, what to report."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmoe.compressed_experts.observing import batches
from jaxmoe.compressed_experts.settings import Settings
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import ExpertBlock
from jaxmoe.solvers.distillation import Examples, Learner, Vectors, begin, learn, schedule, squares

CHECK = 50
"""Steps between two looks at the tokens that are set apart."""

APART = 10
"""One of so many tokens is set apart to test on."""

MOST_APART = 16_384
"""Tokens that are set apart at most."""


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
