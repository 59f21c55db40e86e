"""One right factor for all experts: the row space that serves them together, each with a left factor of its own.

    minimise  sum_e || (D_e - U_e V) C_e^(1/2) ||^2        V [rank, in] shared

V spans the leading right singular vectors of the stacked D_e L, L L' = sum_e C_e, brought back by L^-1, and
U_e = D_e L L' V' serves all alike. From there each U_e moves to the least-squares solution under its own moment,

    U_e  <-  U_e + (D_e - U_e V) C_e V' (V C_e V' + ridge)^-1

which lowers its error or leaves it; directions that none of its tokens had stay as the pooled moment has them.
Source: ShareV of D²-MoE, arXiv 2502.17298, whose code averages Cholesky factors instead of pooling the moments; the
refit is ours.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.solvers.decompositions import eigh
from jaxmoe.solvers.group_spectra import FLOOR, group_bases
from jaxmoe.solvers.mixture import HIGHEST, solve_coefficients, squared_norms


def shared_right(
    weight: Float[AnyArray, "expert out in"],
    *,
    rank: int,
    moment: Float[AnyArray, "..."] | None = None,
    refit: bool = True,
) -> tuple[Float[Array, "expert out rank"], Float[Array, "rank in"]]:
    """Return left factors and the right factor that all experts share.

    Args:
        weight: the matrices.
        rank: rows of the shared factor, 1 to in.
        moment: second moments of the inputs, `[1|expert, in, in]` or `[1|expert, in]` for diagonals; None for an
            unweighted error.
        refit: whether left factors are fitted under each expert's own moment; False takes the pooled one for all.

    Example:
        >>> left, right = shared_right(jnp.ones((2, 3, 4)), rank=1)
        >>> bool(jnp.allclose(left @ right, 1.0, atol=1e-5))
        True
    """
    experts = weight.shape[0]
    weight = jnp.asarray(weight, jnp.float32)
    if moment is not None:
        moment = jnp.asarray(moment, jnp.float32)
        moment = jax.vmap(jnp.diag)(moment) if moment.ndim == 2 else moment
    bases = group_bases(weight, size=experts, rank=rank, moment=moment)
    solve = partial(solve_coefficients, bases=bases, mixing=jnp.ones((experts, 1)), activation="identity")
    if moment is None:
        return solve(weight), bases[0]
    left = solve(weight, moment=_floored(moment.mean(0, keepdims=True)))
    if not refit:
        return left, bases[0]
    remainder = weight - jnp.matmul(left, bases[0], precision=HIGHEST)
    own = left + solve(remainder, moment=moment, ridge=RIDGE)
    # The Gram matrix of an expert with fewer tokens than the rank is singular, and may have no factor in float32.
    before, after = (squared_norms(weight - jnp.matmul(x, bases[0], precision=HIGHEST), moment) for x in (left, own))
    return jnp.where((after <= before)[:, None, None], own, left), bases[0]


def _floored(moment):
    """Return the moments with the eigenvalues that `group_bases` gives them."""
    values, vectors = eigh(moment, symmetrize_input=False)
    values = jnp.maximum(values, FLOOR * values[:, -1:])
    return jnp.matmul(vectors * values[:, None, :], jnp.swapaxes(vectors, 1, 2), precision=HIGHEST)


RIDGE = 1e-4
"""What holds an expert's own fit to the pooled one, in units of the mean diagonal of its Gram matrix."""
