"""One right factor for all experts: the row space that serves them together, each with a left factor of its own.

    minimise  sum_e || (D_e - U_e V) C_e^(1/2) ||^2        V [rank, in] shared

V spans the leading right singular vectors of the stacked D_e L, L L' = sum_e C_e, brought back by L^-1; each U_e is
then the least-squares solution under its own moment, U_e = D_e C_e V' (V C_e V')^-1, which can only lower the error.
Source: ShareV of D²-MoE, arXiv 2502.17298, whose code averages Cholesky factors instead of pooling the moments; the
refit is ours.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.solvers.group_spectra import group_bases
from jaxmoe.solvers.mixture import solve_coefficients


def shared_right(
    weight: Float[Array, "expert out in"], *, rank: int, moment: Array | None = None, refit: bool = True
) -> tuple[Float[Array, "expert out rank"], Float[Array, "rank in"]]:
    """Return left factors and the right factor that all experts share.

    Args:
        weight: the matrices.
        rank: rows of the shared factor, 1 to in.
        moment: second moments of the inputs, `[1|expert, in, in]` or `[1|expert, in]` for diagonals; None weighs alike.
        refit: whether left factors are fitted under each expert's own moment; False takes the pooled one for all.

    Example:
        >>> left, right = shared_right(jnp.ones((2, 3, 4)), rank=1)
        >>> bool(jnp.allclose(left @ right, 1.0, atol=1e-5))
        True
    """
    experts = weight.shape[0]
    if moment is not None:
        moment = jnp.asarray(moment, jnp.float32)
        moment = jax.vmap(jnp.diag)(moment) if moment.ndim == 2 else moment
    bases = group_bases(weight, size=experts, rank=rank, moment=moment)
    pooled = moment if moment is None or refit else moment.mean(0, keepdims=True)
    left = solve_coefficients(weight, bases, jnp.ones((experts, 1)), activation="identity", moment=pooled)
    return left, bases[0]
