"""How far a compressed layer, or linear map, is from the original: relative error of every matrix, as stored.

|| (W_e - What_e) C_e^(1/2) ||  /  || W_e C_e^(1/2) ||,      C_e the second moment of the inputs, or the identity
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmoe.factors.layer import CompressedLayer
from jaxmoe.factors.linear import CompressedLinear

BLOCK = 1 << 24
"""Numbers that are materialised at once."""


@jax.jit
def _sums(weight, materialized, moment):
    def size(matrix):
        weighed = matrix if moment is None else jnp.matmul(matrix, moment, precision=lax.Precision.HIGHEST)
        # Rounding may leave a sum below zero where the moment is singular.
        return jnp.maximum(jnp.sum(weighed * matrix, axis=(1, 2)), 0.0)

    weight = weight.astype(jnp.float32)
    return size(weight - materialized), size(weight)


def relative_errors(weight, layer: CompressedLayer, projection: str, *, moment=None) -> np.ndarray:
    """Return the relative error of every expert, `[expert]`; 0 where both norms vanish, infinite where only W_e's does.

    Experts are materialised in blocks, so that memory stays far below one projection's.

    Args:
        weight: the original matrices of the projection, `[expert, out, in]`.
        layer: its compressed twin.
        projection: "gate", "up" or "down".
        moment: `[1|expert, in, in]`; None for an unweighted error.

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
        own = moment if moment is None or len(moment) == 1 else moment[block]
        errors[block] = _relative(weight[block], layer.materialize(projection, block), own)
    return errors


def linear_error(weight, linear: CompressedLinear, *, moment=None) -> float:
    """Return the relative error of one matrix, as `relative_errors` does.

    Args:
        weight: the original matrix, `[out, in]`.
        linear: its compressed twin.
        moment: `[1, in, in]`; None for an unweighted error.

    Example:
        >>> from jaxmoe.factors import Dense, LinearShape
        >>> half = CompressedLinear(terms=(Dense(weight=0.5 * jnp.ones((1, 3, 4))),), sizes=LinearShape(3, 4))
        >>> linear_error(jnp.ones((3, 4)), half)
        0.5
    """
    return float(_relative(weight[None], linear.materialize()[None], moment)[0])


def _relative(weight, materialized, moment) -> np.ndarray:
    moment = None if moment is None else jnp.asarray(moment, jnp.float32)
    error, norm = (np.asarray(x, np.float64) for x in _sums(weight, materialized, moment))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((error == 0) & (norm == 0), 0.0, np.sqrt(error / norm))
