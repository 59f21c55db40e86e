"""Thin pairs of factors for single experts, W_e ~ L_e R_e, as the recipes that store them fit them."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.solvers.weighted_svd import SVDFit, weighted_svd


def expert_factors(
    weight: Float[AnyArray, "expert out in"], moment: Float[AnyArray, "..."] | None, rank: int
) -> SVDFit:
    """Return the closest factors and all energies in float32, computed in float64 where a second moment weights them.

    The moment squares the condition number of the inputs, the Gram matrix that of the weights.

    Args:
        weight: the matrices.
        moment: second moment of the inputs, `[1|expert, in, in]`, or its diagonal, `[1|expert, in]`; None for the
            identity.
        rank: columns of the left factor.

    Example:
        >>> found = expert_factors(jnp.array([[[3.0, 0.0], [0.0, 1.0]]]), None, 1)
        >>> (found.left @ found.right).round().tolist(), found.energies.round().tolist()
        ([[[3.0, 0.0], [0.0, 0.0]]], [[9.0, 1.0]])
    """
    if moment is None:
        return _factors(jnp.asarray(weight, jnp.float32), None, rank)
    with jax.enable_x64(True):
        found = _factors(jnp.asarray(weight, jnp.float64), jnp.asarray(moment, jnp.float64), rank)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)


@partial(jax.jit, static_argnames="rank")
def _factors(weight, moment, rank):
    return weighted_svd(weight, rank=rank, column_moment=moment)


def balanced(found: SVDFit) -> tuple[Float[Array, "expert out rank"], Float[Array, "expert rank in"]]:
    """Return factors that share the singular values between them, which storage in few bits likes.

    Example:
        >>> left, right = balanced(expert_factors(jnp.array([[[4.0, 0.0], [0.0, 0.0]]]), None, 1))
        >>> abs(left).ravel().tolist(), abs(right).ravel().tolist()
        ([2.0, 0.0], [2.0, 0.0])
    """
    rank = found.left.shape[-1]
    size = jnp.sqrt(jnp.sqrt(jnp.maximum(found.energies[:, :rank], 0.0)))
    scale = jnp.where(size > 0, size, 1.0)
    return found.left * scale[:, None, :], found.right / scale[:, :, None]
