"""How far a compressed layer is from the original: relative error per projection and expert, as stored."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.factors.layer import CompressedLayer

BLOCK = 1 << 24
"""Numbers that are materialised at once."""


@jax.jit
def _sums(weight, materialized):
    weight = weight.astype(jnp.float32)
    return jnp.sum(jnp.square(weight - materialized), axis=(1, 2)), jnp.sum(jnp.square(weight), axis=(1, 2))


def relative_errors(weight, layer: CompressedLayer, projection: str) -> np.ndarray:
    """Return ||W_e - What_e|| / ||W_e|| of every expert, `[expert]`; 0 where both vanish, infinite where only W_e does.

    Experts are materialised in blocks, so that memory stays far below one projection's.

    Args:
        weight: the original matrices of the projection, `[expert, out, in]`.
        layer: its compressed twin.
        projection: "gate", "up" or "down".

    Example:
        >>> from jaxmoe.factors import Dense, LayerShape
        >>> sizes = LayerShape(experts=2, hidden=4, intermediate=3, gated=False)
        >>> ones, zeros = jnp.ones((2, 3, 4)), jnp.zeros((2, 4, 3))
        >>> terms = {"up": (Dense(weight=0.5 * ones),), "down": (Dense(weight=zeros),)}
        >>> layer = CompressedLayer(sizes=sizes, terms=terms)
        >>> relative_errors(ones, layer, "up").tolist()
        [0.5, 0.5]
    """
    experts, out, in_ = weight.shape
    step = max(1, BLOCK // (out * in_))
    errors = np.zeros(experts)
    for start in range(0, experts, step):
        block = slice(start, min(start + step, experts))
        error, norm = (np.asarray(x, np.float64) for x in _sums(weight[block], layer.materialize(projection, block)))
        with np.errstate(divide="ignore", invalid="ignore"):
            errors[block] = np.where((error == 0) & (norm == 0), 0.0, np.sqrt(error / norm))
    return errors
