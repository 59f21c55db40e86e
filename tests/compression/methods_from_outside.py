"""Three methods that do not come with jaxmoe, as a researcher has them: `--import methods_from_outside.py`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.factors import LayerShape, LowRank
from jaxmoe.methods import Fit, Method, QuantisingMethod, Slot, register
from jaxmoe.methods.pruning import Pruned, PruningMethod, PruningSettings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Nothing can be set but what every method has."""

    setting: str = "improved"


def targets(shape: LayerShape, settings: Settings):
    return {"down": 1.0}


def slot(target, shape: LayerShape, dtype, settings, kept, *, weighted=False) -> Slot:
    sizes = shape.of(target)
    return Slot(lambda rank: (LowRank.abstract(sizes, dtype, rank=rank),), 1, 16)


def first_rows(weight, template, settings, *, evidence, key=None) -> Fit:
    """Keep the rows of largest norm of every matrix."""
    (term,) = template
    matrices = np.asarray(weight, np.float32)
    rank, dtype = term.rank, term.left.dtype
    rows = np.argsort(-np.linalg.norm(matrices, axis=2), axis=1)[:, :rank]
    right = np.take_along_axis(matrices, rows[:, :, None], axis=1)
    left = np.eye(matrices.shape[1], dtype=np.float32)[rows].swapaxes(1, 2)
    return Fit((LowRank(left=jnp.asarray(left, dtype), right=jnp.asarray(right, dtype)),))


def last_experts(evidence, keep, settings, *, groups=1) -> Pruned:
    """Keep the last experts."""
    experts = len(evidence.weight("down"))
    return Pruned(np.arange(experts - keep, experts))


def in_half(term):
    """Return a term with its floats in float16."""

    def half(array):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        abstract = isinstance(array, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(array.shape, jnp.float16) if abstract else jnp.asarray(array, jnp.float16)

    return jax.tree.map(half, term)


def widths(settings):
    return (16,)


def abstract(terms, settings, bits):
    assert bits.tolist() == [16] * terms[0].shape[0]
    return tuple(in_half(term) for term in terms)


def fit(terms, settings, bits, *, evidence, key=None) -> Fit:
    return Fit(abstract(terms, settings, bits))


ROWS = register(Method("rows", "the rows of largest norm", Settings, targets, slot, first_rows, lambda template: 0))
LAST = register(
    PruningMethod("last", "the last experts", PruningSettings, "experts", last_experts, lambda settings: {})
)
HALF = register(QuantisingMethod("half", "float16", Settings, widths, abstract, fit))
