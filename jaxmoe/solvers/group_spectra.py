"""Spectra and best bases of groups of experts whose matrices are stacked on top of each other.

    K_g = sum_{e in g} L' W_e' W_e L  =  V diag(energies) V'        or, where it is smaller, of the stacked rows

Groups are consecutive and of equal size; the last may be shorter. A moment C = L L' along the columns weighs them; one
moment for each expert is averaged over its group, because a basis is shared by the group. A moment along the rows
is applied to every expert's rows (`mixture.whiten_rows`). One eigen-decomposition per group and the products that form
K; no loop over experts. Source: Eckart and Young 1936; RFID-MoE, arXiv 2602.09316, for the groups.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.solvers.decompositions import eigh, eigvalsh
from jaxmoe.solvers.mixture import HIGHEST, whiten_rows


class GroupSpectra(NamedTuple):
    """Spectra and bases of groups.

    energies: squared singular values of every stacked group, descending; bases: the rows that lose least at every rank.
    """

    energies: Float[Array, "group spectrum"]
    bases: Float[Array, "group spectrum column"]


@partial(jax.jit, static_argnames="size")
def group_energies(
    weight: Float[AnyArray, "expert row column"],
    *,
    size: int,
    moment: Float[AnyArray, "_ column column"] | None = None,
    row_moment: Float[AnyArray, "_ row row"] | None = None,
) -> Float[Array, "group spectrum"]:
    """Return the squared singular values of every stacked group, descending.

    Args:
        weight: the experts' matrices, in the order in which they are cut into groups.
        size: experts in a group.
        moment: along the columns, `[1|expert, column, column]`.
        row_moment: along the rows, `[1|expert, row, row]`.

    Returns:
        `[group, min(size * row, column)]`; zeros where a shorter group has fewer.

    Example:
        >>> group_energies(jnp.ones((3, 1, 4)), size=2).round().tolist()
        [[8.0, 0.0], [4.0, 0.0]]
    """
    stacked, _ = _stacked(weight, moment, row_moment, size)
    return jnp.maximum(eigvalsh(_gram(stacked), symmetrize_input=False)[:, ::-1], 0.0)


@partial(jax.jit, static_argnames=("size", "rank"))
def group_bases(
    weight: Float[AnyArray, "expert row column"],
    *,
    size: int,
    rank: int,
    moment: Float[AnyArray, "_ column column"] | None = None,
    row_moment: Float[AnyArray, "_ row row"] | None = None,
) -> Float[Array, "group rank column"]:
    """Return the bases that lose least at every rank up to `rank`: the leading ones serve a smaller rank.

    Args:
        weight: the experts' matrices, in the order in which they are cut into groups.
        size: experts in a group.
        rank: rows of every basis, 1 to column.
        moment: along the columns, `[1|expert, column, column]`, positive definite.
        row_moment: along the rows, `[1|expert, row, row]`.

    Example:
        >>> abs(group_bases(jnp.array([[[3.0, 0.0], [0.0, 1.0]]]), size=1, rank=1)).round().tolist()
        [[[1.0, 0.0]]]
    """
    stacked, inverse = _stacked(weight, moment, row_moment, size)
    return _decomposed(stacked, inverse, rank).bases


@partial(jax.jit, static_argnames="size")
def group_spectra(
    weight: Float[AnyArray, "expert row column"],
    *,
    size: int,
    moment: Float[AnyArray, "_ column column"] | None = None,
    row_moment: Float[AnyArray, "_ row row"] | None = None,
) -> GroupSpectra:
    """Return what `group_energies` and `group_bases` give, for all ranks, by one decomposition instead of two.

    Args:
        weight: the experts' matrices, in the order in which they are cut into groups.
        size: experts in a group.
        moment: along the columns, `[1|expert, column, column]`, positive definite.
        row_moment: along the rows, `[1|expert, row, row]`.

    Example:
        >>> found = group_spectra(jnp.array([[[3.0, 0.0], [0.0, 1.0]]]), size=1)
        >>> found.energies.round().tolist(), abs(found.bases).round().tolist()
        ([[9.0, 1.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    """
    stacked, inverse = _stacked(weight, moment, row_moment, size)
    return _decomposed(stacked, inverse, min(stacked.shape[1:]))


def _decomposed(stacked, inverse, rank: int) -> GroupSpectra:
    _, rows, columns = stacked.shape
    if rows < columns and rank <= rows:
        values, left = eigh(_gram(stacked), symmetrize_input=False)
        values, left = values[:, ::-1], left[:, :, ::-1][:, :, :rank]
        # Directions without energy have no right vector; zero serves as well.
        scale = jnp.where(values > 1e-12 * values[:, :1], 1 / jnp.sqrt(jnp.where(values > 0, values, 1.0)), 0.0)
        right = jnp.matmul(jnp.swapaxes(left, 1, 2), stacked, precision=HIGHEST) * scale[:, :rank, None]
    else:
        gram = jnp.matmul(jnp.swapaxes(stacked, 1, 2), stacked, precision=HIGHEST)
        values, vectors = eigh(gram, symmetrize_input=False)
        values, right = values[:, ::-1], jnp.swapaxes(vectors[:, :, ::-1][:, :, :rank], 1, 2)
    right = right if inverse is None else jnp.matmul(right, inverse, precision=HIGHEST)
    return GroupSpectra(jnp.maximum(values, 0.0), right)


def _gram(stacked):
    flipped = jnp.swapaxes(stacked, 1, 2)
    short = stacked.shape[1] < stacked.shape[2]
    return jnp.matmul(stacked, flipped, precision=HIGHEST) if short else jnp.matmul(flipped, stacked, precision=HIGHEST)


def _stacked(weight, moment, row_moment, size):
    """Return the weighted matrices stacked by group, `[group, size * row, column]`, and L^-1 of every group or None."""
    weight = jnp.asarray(weight, jnp.float32)
    experts, rows, columns = weight.shape
    groups = -(-experts // size)
    whole = groups * size - experts
    weight = jnp.pad(whiten_rows(weight, row_moment), ((0, whole), (0, 0), (0, 0)))
    stacked = weight.reshape(groups, size * rows, columns)
    if moment is None:
        return stacked, None
    moment = jnp.asarray(moment, jnp.float32)
    if len(moment) > 1:
        members = jnp.pad(jnp.ones(experts), (0, whole)).reshape(groups, size).sum(1)
        moment = jnp.pad(moment, ((0, whole), (0, 0), (0, 0))).reshape(groups, size, columns, columns).sum(1)
        moment = moment / members[:, None, None]
    values, vectors = eigh(moment, symmetrize_input=False)
    values = jnp.maximum(values, FLOOR * values[:, -1:])
    root = vectors * jnp.sqrt(values)[:, None, :]
    inverse = jnp.swapaxes(vectors, 1, 2) / jnp.sqrt(values)[:, :, None]
    return jnp.matmul(stacked, root, precision=HIGHEST), inverse


FLOOR = 1e-6
"""Smallest eigenvalue of a moment whose root is inverted, as a fraction of the largest."""
