"""The mixture of bases, W_e ~ A_e f(sum_j alpha_ej B_j): what both solvers of it share.

Blocks of experts, the published start, normalisation, the exact coefficients for given bases, and the error. Shapes:
weights `[expert, row, column]` = [E, P, Q], coefficients [E, P, r], bases [M, r, Q], mixing [E, M]. The second moment C
of the inputs, `[1|expert, column, column]`, weighs the columns: the error of an expert is tr(R C R^T), R = W - What.
A moment along the rows needs no solver: replacing W by L^T W, with L L^T the moment, turns it into an ordinary problem
with coefficients L^T A (`whiten_rows`).

Source: MoBE, arXiv 2508.05257.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.shared_basis import ACTIVATIONS
from jaxmoe.solvers.decompositions import cholesky, eigh, solve_lower

HIGHEST = lax.Precision.HIGHEST


class Ragged(NamedTuple):
    """Bases of unequal ranks: rows beyond a base's rank are zero, and an expert uses the rows of its own base only.

    Functions with f(0) = 0 leave such rows out of everything (RFID-MoE, arXiv 2602.09316, equation 14).

    Args:
        ranks: of the bases; the largest is the rank of the fit.
        owner: the base whose rank each expert has.
    """

    ranks: Int[Array, " base"]
    owner: Int[Array, " expert"]

    def of_bases(self, rank: int) -> Float[Array, "base rank 1"]:
        """Return 1 in the rows that bases have, 0 beyond."""
        return (jnp.arange(rank) < jnp.asarray(self.ranks)[:, None]).astype(jnp.float32)[..., None]

    def of_experts(self, rank: int) -> Float[Array, "expert rank 1"]:
        """Return 1 in the rows that experts use, 0 beyond."""
        return self.of_bases(rank)[jnp.asarray(self.owner)]


class BasisFit(NamedTuple):
    """A mixture of bases in the weights' own scale, and how it was found.

    Args:
        coefficients: A, with the normalisation folded in.
        bases: B.
        mixing: alpha.
        mean: the constant that is added to every entry (0 unless `normalize="zscore"`).
        error: relative error of every expert under the objective, sqrt(tr(R C R^T) / tr(W C W^T)).
        losses: squared relative error before each step; NaN from the first step not taken.
        steps: steps taken.
        rates: of the long steps: asked for, chosen by trial, and at the end.
        returns: times that the loss rose so far above its best that the descent returned there, with a smaller rate.
        diverged: whether the loop ended at a loss that is not finite; what is returned is the best before.
    """

    coefficients: Float[Array, "expert row rank"]
    bases: Float[Array, "base rank column"]
    mixing: Float[Array, "expert base"]
    mean: Float[Array, ""]
    error: Float[Array, " expert"]
    losses: Float[Array, " step"]
    steps: Int[Array, ""]
    rates: Float[Array, "3"]
    returns: Int[Array, ""]
    diverged: Bool[Array, ""]


def check_sizes(shape: tuple[int, ...], bases: int, rank: int, activation: str, ragged: Ragged | None = None) -> None:
    """Raise if a mixture of these sizes cannot be fitted to matrices of this shape."""
    experts, rows, columns = shape
    faults = []
    if not 1 <= bases <= experts:
        faults.append(f"{bases} bases for {experts} experts: choose 1 to {experts}")
    # The widest of unequal bases may have more rows than the matrices: the published ranks do.
    most = min(rows, columns) if ragged is None else columns
    if not 1 <= rank <= most:
        faults.append(f"rank {rank} for matrices of {rows} x {columns}: choose 1 to {most}")
    if activation not in ACTIVATIONS:
        faults.append(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    elif ragged is not None and ACTIVATIONS[activation](0.0) != 0:
        faults.append(f"{activation}(0) is not 0: bases of unequal ranks need a function that vanishes there")
    if ragged is not None and (np.shape(ragged.ranks) != (bases,) or np.shape(ragged.owner) != (experts,)):
        faults.append(f"{np.shape(ragged.ranks)} ranks and {np.shape(ragged.owner)} owners: one per base and expert")
    if faults:
        raise JaxmoeError("; ".join(faults))


def owners(experts: int, bases: int) -> np.ndarray:
    """Return the consecutive block that each expert belongs to; block sizes differ by at most one.

    Example:
        >>> owners(5, 2).tolist()
        [0, 0, 0, 1, 1]
    """
    return np.repeat(np.arange(bases), [len(block) for block in np.array_split(np.arange(experts), bases)])


def location_and_scale(weight: Float[AnyArray, "expert row column"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return mean and population standard deviation of all entries; exactly (c, 0) for a constant c."""
    first = weight[0, 0, 0]
    shifted = weight - first
    mean = jnp.mean(shifted)
    return first + mean, jnp.sqrt(jnp.mean((shifted - mean) ** 2))


def activate(blend: Array, activation: str) -> tuple[Array, Array]:
    """Return f and its derivative."""
    return jax.jvp(ACTIVATIONS[activation], (blend,), (jnp.ones_like(blend),))


def blend(mixing: Float[AnyArray, "expert base"], bases: Float[AnyArray, "base rank column"]):
    """Return sum_j alpha_ej B_j as one matrix product."""
    flat = jnp.matmul(mixing, bases.reshape(bases.shape[0], -1), precision=HIGHEST)
    return flat.reshape(mixing.shape[0], *bases.shape[1:])


def reconstruct(coefficients, bases, mixing, activation: str) -> Float[Array, "expert row column"]:
    """Return A f(blend) of every expert; where ranks are unequal, coefficients beyond an expert's are zero."""
    return jnp.matmul(coefficients, ACTIVATIONS[activation](blend(mixing, bases)), precision=HIGHEST)


def pull_back(gradient, mixing, bases):
    """Return the gradients with respect to bases and mixing from that with respect to the blends.

    Written as products of matrices: XLA runs the equivalent `einsum("erd,mrd->em")` six times slower on CPU.
    """
    flat = gradient.reshape(gradient.shape[0], -1)
    d_bases = jnp.matmul(mixing.T, flat, precision=HIGHEST).reshape(bases.shape)
    d_mixing = jnp.matmul(bases.reshape(bases.shape[0], -1), flat.T, precision=HIGHEST).T
    return d_bases, d_mixing


def weigh(matrix: Float[AnyArray, "expert row column"], moment: Float[AnyArray, "_ column column"] | None):
    """Return matrix @ C for a pooled or a per-expert C, `[1|expert, column, column]`, or the matrix without one."""
    return matrix if moment is None else jnp.matmul(matrix, moment, precision=HIGHEST)


def whiten_rows(weight: Float[AnyArray, "expert row column"], row_moment: Float[AnyArray, "_ row row"] | None):
    """Return L^T W with L L^T the moment along the rows; its plain error is the error of W under that moment."""
    if row_moment is None:
        return weight
    values, vectors = eigh(row_moment)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[..., None, :]
    return jnp.matmul(jnp.swapaxes(root, -1, -2), weight, precision=HIGHEST)


def block_svd(
    weight: Float[AnyArray, "expert row column"], bases: int, rank: int, ragged: Ragged | None = None
) -> tuple[Float[Array, "expert row rank"], Float[Array, "base rank column"]]:
    """Return the best bases and coefficients if every block of experts had one linear basis of its own.

    Right singular vectors come from the blocks' Gram matrices: a start needs no more digits.
    """
    owner = owners(weight.shape[0], bases) if ragged is None else ragged.owner
    spread = jax.nn.one_hot(owner, bases, dtype=weight.dtype)
    grams = jnp.einsum("epq,epk->eqk", weight, weight, precision=HIGHEST)
    grams = jnp.einsum("eb,eqk->bqk", spread, grams, precision=HIGHEST)
    vectors = eigh(grams)[1][..., ::-1][..., :rank]
    # Eigenvectors have no sign of their own, but f(-V) is not -f(V): let the largest entry be positive.
    peak = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True), axis=-2)
    vectors = vectors * jnp.where(peak < 0, -1.0, 1.0)
    if ragged is not None:
        vectors = vectors * jnp.swapaxes(ragged.of_bases(rank), 1, 2)
    coefficients = jnp.matmul(weight, vectors[owner], precision=HIGHEST)
    return coefficients, jnp.swapaxes(vectors, -1, -2)


def solve_coefficients(
    weight: Float[AnyArray, "expert row column"],
    bases: Float[AnyArray, "base rank column"],
    mixing: Float[AnyArray, "expert base"],
    *,
    activation: str,
    moment: Float[AnyArray, "_ column column"] | None = None,
    ragged: Ragged | None = None,
    ridge: float = 1e-6,
    refinements: int = 2,
) -> Float[Array, "expert row rank"]:
    """Return the coefficients that minimise tr(R C R^T), R = W - A f(blend), for given bases and mixing.

    Call it again after bases and mixing were rounded to the storage type, so that A absorbs their rounding. A weight
    along the rows does not change the answer.

    Args:
        weight: W.
        bases: B, of any float type.
        mixing: alpha, of any float type.
        activation: a name in `ACTIVATIONS`.
        moment: C, `[1|expert, column, column]`, or None for the identity.
        ragged: unequal ranks; coefficients beyond an expert's rank are zero.
        ridge: floor added to the Gram matrix of f(blend), in units of its mean diagonal; the refinements undo its bias
            wherever the Gram matrix is not singular.
        refinements: times that the residual is fitted again.

    Returns:
        A, in float32.

    Example:
        >>> bases = jnp.array([[[1.0, -1.0, 2.0]]])
        >>> mixing = jnp.array([[0.5], [2.0]])
        >>> weight = 3 * jnp.tanh(blend(mixing, bases))
        >>> solve_coefficients(weight, bases, mixing, activation="tanh").ravel()
        Array([3., 3.], dtype=float32)
    """
    weight, bases, mixing = (jnp.asarray(x, jnp.float32) for x in (weight, bases, mixing))
    features = ACTIVATIONS[activation](blend(mixing, bases))
    if ragged is not None:
        features = features * ragged.of_experts(features.shape[1])
    weighed = jnp.swapaxes(weigh(features, moment), -1, -2)
    factor = cholesky_with_floor(jnp.matmul(features, weighed, precision=HIGHEST), ridge)
    coefficients = right_solve(jnp.matmul(weight, weighed, precision=HIGHEST), factor)
    for _ in range(refinements):
        residual = weight - jnp.matmul(coefficients, features, precision=HIGHEST)
        coefficients += right_solve(jnp.matmul(residual, weighed, precision=HIGHEST), factor)
    return coefficients


def cholesky_with_floor(gram: Float[AnyArray, "expert rank rank"], ridge: float):
    """Return the lower Cholesky factor of the Gram matrix plus `ridge` times its mean diagonal."""
    rank = gram.shape[-1]
    floor = ridge * jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / rank
    # An expert whose features all vanish still needs a factor; its coefficients are then exactly zero.
    floor = jnp.where(floor > 0, floor, 1.0)
    return cholesky(gram + floor * jnp.eye(rank, dtype=gram.dtype), symmetrize_input=False)


def lower_inverse(factor: Float[AnyArray, "expert rank rank"]) -> Float[Array, "expert rank rank"]:
    """Return the inverse of lower triangular matrices, by halves: products are faster than a triangular solution.

        [A 0]^-1   [    A^-1          0  ]
        [B C]    = [-C^-1 B A^-1    C^-1 ]

    Example:
        >>> lower_inverse(jnp.array([[[2.0, 0.0], [1.0, 1.0]]])).tolist()
        [[[0.5, 0.0], [-0.5, 1.0]]]
    """
    return _lower_inverse(factor, max(16, factor.shape[-1] // 4))


def _lower_inverse(factor, largest: int):
    rank = factor.shape[-1]
    if rank <= largest:
        identity = jnp.broadcast_to(jnp.eye(rank, dtype=factor.dtype), factor.shape)
        return solve_lower(factor, identity)
    half = rank // 2
    first, last = (_lower_inverse(factor[:, part, part], largest) for part in (slice(half), slice(half, None)))
    product = jnp.matmul(factor[:, half:, :half], first, precision=HIGHEST)
    below = jnp.concatenate([-jnp.matmul(last, product, precision=HIGHEST), last], 2)
    return jnp.concatenate([jnp.pad(first, [(0, 0), (0, 0), (0, rank - half)]), below], 1)


def right_solve(right: Float[AnyArray, "expert row rank"], factor: Float[AnyArray, "expert rank rank"]):
    """Return X S^-1 for S = L L^T, given L."""
    half = solve_lower(factor, right, left_side=False, transpose=True)
    return solve_lower(factor, half, left_side=False)


def squared_norms(
    matrix: Float[AnyArray, "expert row column"], moment: Float[AnyArray, "_ column column"] | None = None
) -> Float[Array, " expert"]:
    """Return tr(X C X^T) of every expert."""
    return jnp.sum(weigh(matrix, moment) * matrix, axis=(1, 2))


def relative_errors(
    weight, approximation, moment: Float[AnyArray, "_ column column"] | None = None
) -> Float[Array, " expert"]:
    """Return sqrt(tr(R C R^T) / tr(W C W^T)) of every expert; 0 where both vanish."""
    lost, whole = squared_norms(weight - approximation, moment), squared_norms(weight, moment)
    lost = jnp.maximum(lost, 0.0)
    ratio = lost / jnp.where(whole > 0, whole, 1.0)
    return jnp.sqrt(jnp.where((whole > 0) | (lost == 0), ratio, jnp.inf))
