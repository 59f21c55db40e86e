"""Decompositions and solutions of batches of matrices that cannot wait for each other.

On CPU, jaxlib before 0.11.2 spreads the matrices of one LAPACK call over XLA's pool of threads and blocks the thread
that called until all are done. As many such calls at once as the pool has threads, of one program or of several, then
hold every thread while each waits for another: nothing ever moves again. Two cores and two independent decompositions
are enough. There, matrices go one by one (`lax.map`), a call that has nothing to spread and blocks nobody; the numbers
are the same. Newer versions never spread them, and GPU and TPU have batched kernels: there the call is the plain one.

All functions take `[..., row, column]` with any leading axes. Each is compiled as a whole, once for a shape: called by
itself, the loop over the matrices would be compiled anew every time. Under `jax.vmap` matrices that go one by one
become batches again: give leading axes instead. Nothing else in the package may call these functions of JAX by itself;
the linter holds that.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray

BLOCKING = jax.__version_info__ < (0, 11, 2)
"""Whether a batched LAPACK call of this jaxlib waits for other threads."""


@partial(jax.jit, static_argnames="symmetrize_input")
def cholesky(
    matrix: Float[AnyArray, "*batch side side"], *, symmetrize_input: bool = True
) -> Float[Array, "*batch side side"]:
    """Return the lower Cholesky factors of symmetric matrices.

    Args:
        matrix: the matrices.
        symmetrize_input: take the mean of both triangles; False reads the lower one.

    Returns:
        L with L Lᵀ the matrix; NaN where the matrix is not positive definite.

    Example:
        >>> cholesky(jnp.array([[[4.0, 2.0], [2.0, 2.0]]])).tolist()
        [[[2.0, 0.0], [1.0, 1.0]]]
    """
    return _batched(partial(lax.linalg.cholesky, symmetrize_input=symmetrize_input), matrix)


@partial(jax.jit, static_argnames="symmetrize_input")
def eigh(
    matrix: Float[AnyArray, "*batch side side"], *, symmetrize_input: bool = True
) -> tuple[Float[Array, "*batch side"], Float[Array, "*batch side side"]]:
    """Return the eigenvalues, ascending, and eigenvectors, in columns, of symmetric matrices.

    Args:
        matrix: the matrices.
        symmetrize_input: take the mean of both triangles; False, for what is symmetric already, such as a product with
            its own transpose, saves that.

    Example:
        >>> eigh(jnp.diag(jnp.array([2.0, 1.0])))[0].tolist()
        [1.0, 2.0]
    """
    return _batched(lambda own: tuple(jnp.linalg.eigh(own, symmetrize_input=symmetrize_input)), matrix)


@partial(jax.jit, static_argnames="symmetrize_input")
def eigvalsh(
    matrix: Float[AnyArray, "*batch side side"], *, symmetrize_input: bool = True
) -> Float[Array, "*batch side"]:
    """Return the eigenvalues of symmetric matrices, ascending; see `eigh`.

    Example:
        >>> eigvalsh(jnp.diag(jnp.array([2.0, 1.0]))).tolist()
        [1.0, 2.0]
    """
    return _batched(partial(jnp.linalg.eigvalsh, symmetrize_input=symmetrize_input), matrix)


@jax.jit
def orthonormal(matrix: Float[AnyArray, "*batch row column"]) -> Float[Array, "*batch row column"]:
    """Return an orthonormal basis of the span of the columns, by QR; row >= column.

    Example:
        >>> abs(orthonormal(jnp.array([[0.0], [4.0]]))).tolist()
        [[0.0], [1.0]]
    """
    return _batched(lambda own: jnp.linalg.qr(own)[0], matrix)


@jax.jit
def solve(
    matrix: Float[AnyArray, "*batch side side"], right: Float[AnyArray, "*batch side column"]
) -> Float[Array, "*batch side column"]:
    """Return the solutions X of A X = right, by LU decomposition.

    Example:
        >>> solve(jnp.array([[2.0, 1.0], [0.0, 1.0]]), jnp.array([[4.0], [2.0]])).ravel().tolist()
        [1.0, 2.0]
    """
    return _batched(jnp.linalg.solve, matrix, right)


@partial(jax.jit, static_argnames=("left_side", "transpose"))
def solve_lower(
    factor: Float[AnyArray, "*batch side side"],
    right: Float[AnyArray, "*batch row column"],
    *,
    left_side: bool = True,
    transpose: bool = False,
) -> Float[Array, "*batch row column"]:
    """Solve with lower triangular matrices.

    Args:
        factor: L.
        right: X; its rows (columns, unless `left_side`) are as many as L has.
        left_side: return L⁻¹ X, or else X L⁻¹.
        transpose: take Lᵀ instead of L.

    Example:
        >>> solve_lower(jnp.array([[2.0, 0.0], [1.0, 1.0]]), jnp.array([[2.0], [3.0]])).ravel().tolist()
        [1.0, 2.0]
    """
    solve = partial(lax.linalg.triangular_solve, left_side=left_side, lower=True, transpose_a=transpose)
    return _batched(solve, factor, right)


def _batched(function: Callable, *matrices: AnyArray):
    batch = matrices[0].shape[:-2]
    if not BLOCKING or not batch:
        return function(*matrices)
    flat = [matrix.reshape(-1, *matrix.shape[-2:]) for matrix in matrices]
    found = lax.platform_dependent(*flat, cpu=partial(_one_by_one, function), default=function)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), found)


def _one_by_one(function, *matrices):
    if matrices[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(*(matrix[0] for matrix in matrices)))
    return lax.map(lambda each: function(*each), matrices)
