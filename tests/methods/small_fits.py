"""Fits of a few small experts, by any method."""

import jax
import numpy as np

from jaxmoe import methods
from jaxmoe.factors import LayerShape, stack
from jaxmoe.methods import Evidence

SHAPE = LayerShape(experts=6, hidden=32, intermediate=20)


def drawn():
    """Return experts with a decaying spectrum, as trained ones have, by projection."""
    rng = np.random.default_rng(0)
    made = {}
    for projection in SHAPE.projections:
        experts, out, in_ = SHAPE.of(projection)
        decay = np.geomspace(1, 0.1, in_)
        made[projection] = (rng.normal(size=(experts, out, in_)) * decay * 0.02).astype(np.float32)
    return made


WEIGHTS = drawn()


def moments(size, *, shared, tokens=2000, seed=2, weakest=0.05):
    """Return inputs of unequal strength, `[1|expert, token, in]`, and their second moments."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(1 if shared else SHAPE.experts, tokens, size)) * np.geomspace(2, weakest, size)
    return inputs, np.einsum("eti,etj->eij", inputs, inputs) / tokens


def fitted(name, target, weights=WEIGHTS, *, level, dtype="float32", moment=None, **settings):
    """Return the fit of a target at a level of its ladder, and the target's matrices."""
    recipe = methods.get(name)
    chosen = recipe.settings(**settings)
    assert target in recipe.targets(SHAPE, chosen)
    slot = recipe.slot(target, SHAPE, np.dtype(dtype), chosen, 0.5)
    weight = stack(weights, target)
    evidence = Evidence(target=target, moment=moment)
    result = recipe.fit(weight, slot.at(level), chosen, evidence=evidence, key=jax.random.key(0))
    return result, np.asarray(weight)


def materialized(result):
    """Return what a fit stands for, in float64."""
    return sum(np.asarray(term.materialize(), np.float64) for term in result.terms)


def relative(result, weight):
    """Return the relative error of a fit."""
    difference = materialized(result) - weight
    return np.linalg.norm(difference) / np.linalg.norm(weight)
