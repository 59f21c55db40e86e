"""Compensators in few bits: low-rank factors of unequal ranks, both sides rounded along their long axes.

    L_e R_e :   column k of L_e and row k of R_e are rows of what a `Grouped` term with groups of one expert stores

A row has so many numbers that the scales of its groups cost little, which those of rows of as many numbers as the rank
would not.
"""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.factors import Grouped
from jaxmoe.factors.quantised import QuantisedArray
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.solvers.compensation import Factors
from jaxmoe.solvers.decompositions import solve
from jaxmoe.solvers.error_feedback import error_feedback
from jaxmoe.solvers.rounding import round_nearest


def abstract_compensators(shape: tuple[int, int, int], total: int, widest: int, store: Store) -> Grouped:
    """Return the abstract term of compensators whose ranks add up to `total`.

    Example:
        >>> term = abstract_compensators((2, 64, 128), 3, 2, Store(bits=4, group=32, zero="none"))
        >>> term.count().bytes == 3 * (64 + 128) // 2 + 3 * (64 + 128) // 32 * 2 + 2 * 4
        True
    """
    term = Grouped.abstract(shape, jnp.float32, total=total, widest=widest)

    def held(array):
        return QuantisedArray.abstract(array.shape, store.fitted(array.shape[1]))

    return replace(term, coefficients=held(term.coefficients), bases=held(term.bases))


def rounded_factors(factors: Factors, store: Store) -> Factors:
    """Return factors with both sides rounded to the nearest codes, each for itself."""
    left, first = _rounded(jnp.swapaxes(factors.left, 1, 2), store)
    right, second = _rounded(factors.right, store)
    return Factors(jnp.swapaxes(left, 1, 2), right, (first, second))


def refitted_factors(
    rest: Float[AnyArray, "expert out in"], factors: Factors, store: Store, moment: Float[AnyArray, "..."] | None
) -> Factors:
    """Return factors of which the right one is solved once more against the left one as it is held, and then rounded.

    Whatever weighs the inputs, R = (LᵀL)^-1 Lᵀ rest is the closest; with a moment it is rounded with error feedback.

    Args:
        rest: what the factors stand for.
        factors: the closest ones of full precision.
        store: of their rows; groups that do not divide them become smaller, or whole rows.
        moment: second moment of the inputs, `[1|expert, in, in]`, or None.
    """
    left, first = _rounded(jnp.swapaxes(factors.left, 1, 2), store, search=True)
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    gram = product(left, jnp.swapaxes(left, 1, 2))
    # Beyond an expert's rank all numbers are zero, and stay so.
    floor = 1e-6 * jnp.trace(gram, axis1=1, axis2=2)[:, None, None] + 1e-30
    right = solve(gram + floor * jnp.eye(gram.shape[1]), product(left, rest))
    if moment is None:
        right, second = _rounded(right, store, search=True)
    else:
        own = store.fitted(right.shape[2])
        second = error_feedback(right, own, moment=moment, order=True)
        right = second.values(own)
    return Factors(jnp.swapaxes(left, 1, 2), right, (first, second))


def _rounded(rows: Array, store: Store, *, search: bool = False) -> tuple[Array, Rounded]:
    own = store.fitted(rows.shape[2])
    found = round_nearest(rows, own, search=search)
    return found.values(own), found


def packed_compensators(
    found: list[tuple[Rounded, Rounded]], ranks: Int[np.ndarray, " expert"], columns: tuple[int, int], store: Store
) -> Grouped:
    """Return the term of all experts' compensators.

    Args:
        found: of every expert, columns of the left factor and rows of the right one, `[1, rank or more, ...]`.
        ranks: how many of them each expert has.
        columns: outputs and inputs of a matrix.
        store: of rows.
    """
    sides = []
    for side, width in enumerate(columns):
        parts = [
            [own[side].codes[0, :rank], cast(Any, own[side].scale)[0, :rank]]
            for own, rank in zip(found, ranks.tolist())
        ]
        codes, scale = (np.concatenate([np.asarray(x) for x in own])[None] for own in zip(*parts))
        sides.append(QuantisedArray.pack(Rounded(codes, scale), store.fitted(width), shape=codes.shape[1:]))
    return Grouped(
        coefficients=sides[0],
        bases=sides[1],
        ranks=np.asarray(ranks, np.int32)[None],
        experts=len(found),
        widest=int(ranks.max()),
    )
