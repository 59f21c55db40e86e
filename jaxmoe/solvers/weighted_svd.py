"""Weighted truncated SVD: the closest matrix of a given rank, when some rows and columns matter more.

    minimise  || P (W - L R) Q ||_F    over L [out, rank], R [rank, in],    PᵀP = row moment,  Q Qᵀ = column moment

One core serves plain SVD, ASVD, FWSVD, SVD-LLM whitening, LoRD and low-rank deltas: they differ in the moments alone.
It needs no inverse where one side is weighted: with U the leading eigenvectors of W (Q Qᵀ) Wᵀ the minimiser is
U (Uᵀ W), also when the moment is singular. Only with both sides weighted is P inverted, its eigenvalues floored.

The eigenvectors come from a Gram matrix on the shorter side, about three times faster than an SVD at equal float32
accuracy of the product. It squares the condition number: give float64 arrays (inside `jax.enable_x64(True)`) where a
moment is ill-conditioned. Cost: one eigen-decomposition and two to three products per expert. It does not choose ranks.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.solvers.decompositions import eigh, eigvalsh, orthonormal
from jaxmoe.solvers.second_moment import check_moment

FLOOR = 1e-9
"""Smallest eigenvalue of an inverted row moment, as a fraction of its largest."""


class SVDFit(NamedTuple):
    """Factors and spectrum.

    left: `[expert, out, rank]`; right: `[expert, rank, in]`; energies: squared singular values of the weighted
    matrices, descending, `[expert, min(out, in)]`. The weighted squared error is the sum of the energies beyond the
    rank.
    """

    left: Float[Array, "expert out rank"]
    right: Float[Array, "expert rank in"]
    energies: Float[Array, "expert spectrum"]


def _product(equation, *operands):
    return jnp.einsum(equation, *operands, precision=lax.Precision.HIGHEST)


def _leading(gram, rank):
    """Return the leading eigenvectors `[expert, side, rank]` and all eigenvalues, descending, of Gram matrices."""
    # A product with its own transpose is symmetric already.
    values, vectors = eigh(gram, symmetrize_input=False)
    return vectors[..., ::-1][..., :rank], jnp.maximum(values[..., ::-1], 0)


def _times(weight, moment):
    """Multiply columns by a diagonal `[1|expert, in]` or full `[1|expert, in, in]` moment."""
    if moment.ndim == 2:
        return weight * moment[:, None, :]
    return _product("eoi,eij->eoj", weight, jnp.broadcast_to(moment, (weight.shape[0], *moment.shape[1:])))


def _root(moment):
    """Return the symmetric square root of a moment."""
    if moment.ndim == 2:
        return jnp.sqrt(moment)
    values, vectors = eigh(moment)
    return _product("eij,ej,ekj->eik", vectors, jnp.sqrt(jnp.maximum(values, 0)), vectors)


def _column_weighted(weight, moment, rank) -> SVDFit:
    _, out, in_ = weight.shape
    if out <= in_:
        weighted = weight if moment is None else _times(weight, moment)
        left, energies = _leading(_product("eoi,epi->eop", weighted, weight), rank)
    else:
        root = weight if moment is None else _times(weight, _root(moment))
        vectors, energies = _leading(_product("eoi,eoj->eij", root, root), rank)
        if moment is None:
            return SVDFit(_product("eoi,eir->eor", weight, vectors), jnp.swapaxes(vectors, 1, 2), energies)
        # The images of the leading right vectors span the left ones; QR makes them orthonormal without dividing by
        # singular values that may vanish.
        left = orthonormal(_product("eoi,eir->eor", root, vectors))
    return SVDFit(left, _product("eor,eoi->eri", left, weight), energies)


def weighted_svd(
    weight: Float[AnyArray, "expert out in"],
    *,
    rank: int,
    row_moment: Float[AnyArray, "..."] | None = None,
    column_moment: Float[AnyArray, "..."] | None = None,
) -> SVDFit:
    """Return the factors of given rank that minimise the weighted squared error of every expert.

    Args:
        weight: the matrices, `[expert, out, in]`, float32 or float64; the result has the same type.
        rank: columns of the left factor, 1 to min(out, in).
        row_moment: weight on the outputs: None, diagonal `[1|expert, out]` or full `[1|expert, out, out]`; symmetric,
            positive semi-definite. A leading 1 means one for all experts.
        column_moment: weight on the inputs, such as E[x xᵀ] of the activations: None, `[1|expert, in]` or
            `[1|expert, in, in]`.

    Returns:
        `SVDFit(left, right, energies)`.

    Raises:
        JaxmoeError: the rank is out of range or a moment has the wrong shape.

    Source:
        Eckart and Young 1936; the inverse-free weighted form follows from projecting W on the leading eigenvectors of
        W C Wᵀ.

    Example:
        >>> weight = jnp.array([[[3.0, 0.0], [0.0, 1.0]]])
        >>> fit = weighted_svd(weight, rank=1)
        >>> abs(fit.left @ fit.right).round().astype(int).tolist()
        [[[3, 0], [0, 0]]]
        >>> fit = weighted_svd(weight, rank=1, column_moment=jnp.array([[1.0, 16.0]]))
        >>> abs(fit.left @ fit.right).round().astype(int).tolist()
        [[[0, 0], [0, 1]]]
    """
    experts, out, in_ = weight.shape
    if not 1 <= rank <= min(out, in_):
        raise JaxmoeError(f"rank {rank} of matrices [{out}, {in_}]: give 1 to {min(out, in_)}")
    check_moment("row_moment", row_moment, experts, out, diagonal=True)
    check_moment("column_moment", column_moment, experts, in_, diagonal=True)

    if row_moment is None:
        return _column_weighted(weight, column_moment, rank)
    if column_moment is None:
        flipped = _column_weighted(jnp.swapaxes(weight, 1, 2), row_moment, rank)
        return SVDFit(jnp.swapaxes(flipped.right, 1, 2), jnp.swapaxes(flipped.left, 1, 2), flipped.energies)
    if row_moment.ndim == 2:
        root = jnp.sqrt(jnp.maximum(row_moment, FLOOR * jnp.max(row_moment, axis=-1, keepdims=True)))[..., None]
        fit = _column_weighted(root * weight, column_moment, rank)
        return fit._replace(left=fit.left / root)
    values, vectors = eigh(row_moment)
    root = jnp.sqrt(jnp.maximum(values, FLOOR * values[..., -1:]))[..., None]
    vectors, root = (jnp.broadcast_to(x, (experts, *x.shape[1:])) for x in (vectors, root))
    fit = _column_weighted(root * _product("eop,eoi->epi", vectors, weight), column_moment, rank)
    return fit._replace(left=_product("eop,epr->eor", vectors, fit.left / root))


def weighted_energies(
    weight: Float[AnyArray, "expert out in"], *, column_moment: Float[AnyArray, "..."] | None = None
) -> Float[Array, "expert spectrum"]:
    """Return the squared singular values of W C^(1/2), descending: what `weighted_svd` gives, without its vectors.

    Args:
        weight: the matrices, `[expert, out, in]`, float32 or float64.
        column_moment: C, as in `weighted_svd`.

    Returns:
        `[expert, min(out, in)]`; the squared error at rank r is the sum beyond the first r.

    Example:
        >>> weighted_energies(jnp.array([[[3.0, 0.0], [0.0, 1.0]]])).round().tolist()
        [[9.0, 1.0]]
    """
    experts, out, in_ = weight.shape
    check_moment("column_moment", column_moment, experts, in_, diagonal=True)
    if out <= in_:
        weighted = weight if column_moment is None else _times(weight, column_moment)
        gram = _product("eoi,epi->eop", weighted, weight)
    else:
        root = weight if column_moment is None else _times(weight, _root(column_moment))
        gram = _product("eoi,eoj->eij", root, root)
    return jnp.maximum(eigvalsh(gram, symmetrize_input=False)[..., ::-1], 0)
