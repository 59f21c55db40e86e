"""A rounded matrix and a low-rank compensator of its error, found in turn.

    minimise  || (W - Q - L R) C^(1/2) ||_F        Q rounded, L R of a given rank, C the second moment of the inputs

Each round rounds W - L R, then takes the closest L R to what that leaves of W, and may round the factors too, so that
the next rounding takes up their error. With a real rounding the error is not monotone: it often rises from the first
round on. Each expert keeps its best round.
Source: MiLo, arXiv 2504.02658; its released code keeps the last round, and rounds the factors after it.

Cost: a rounding and a truncated SVD in each round. Which ranks the experts get is the caller's affair;
`excess_kurtosis` and `published_ranks` are MiLo's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.solvers.second_moment import check_moment
from jaxmoe.solvers.weighted_svd import weighted_svd

WINDOW = 3
"""Rounds whose mean error is compared with that of as many, one round before."""


class Factors(NamedTuple):
    """A compensator: numbers that are zero beyond an expert's rank, and what is stored of them.

    left: `[expert, out, widest]`; right: `[expert, widest, in]`; stored: any arrays with the experts in front.
    """

    left: Float[Array, "expert out rank"]
    right: Float[Array, "expert rank in"]
    stored: Any = None


class Compensated(NamedTuple):
    """The best round of every expert, and the weighted error of all rounds, `[round, expert]`."""

    rounded: Rounded
    factors: Factors
    errors: Float[np.ndarray, "round expert"]


def compensate(
    weight: Float[AnyArray, "expert out in"],
    store: Store,
    *,
    ranks: Int[np.ndarray, " expert"],
    rounds: int,
    rounding: Callable[[Array], Rounded],
    moment: Float[AnyArray, "..."] | None = None,
    hold: Callable[[Array, Factors], Factors] | None = None,
    tolerance: float | None = None,
) -> Compensated:
    """Return rounded matrices with compensators of their errors.

    Args:
        weight: the matrices W.
        store: how the rounded ones are held.
        ranks: of every expert's compensator, known on the host; 0 leaves an expert without.
        rounds: how many follow the first one.
        rounding: rounds matrices to the store, each expert by itself.
        moment: C, `[1|expert, in, in]`, or its diagonal, `[1|expert, in]`; None for the identity.
        hold: returns the factors as they will be held, given what they are to compensate for, W - Q, and the best
            ones of full precision, `left` and `right` sharing the singular values between them.
        tolerance: stop when no expert's error, in the mean over `WINDOW` rounds, falls by more than this fraction;
            None carries out all rounds.

    Returns:
        `Compensated`; an expert's error is the least of its column of `errors`.

    Raises:
        JaxmoeError: a rank or the number of rounds is out of range, or a moment has the wrong shape.

    Example:
        >>> from jaxmoe.solvers.rounding import round_nearest
        >>> store, weight = Store(bits=2, group=2), jnp.array([[[4.0, 1.0], [1.0, 0.5]]])
        >>> found = compensate(
        ...     weight, store, ranks=np.array([2]), rounds=0, rounding=lambda own: round_nearest(own, store))
        >>> found.errors.shape, bool(found.errors[0, 0] < 1e-5)
        ((1, 1), True)
    """
    experts, out, in_ = weight.shape
    check_moment("moment", moment, experts, in_, diagonal=True)
    ranks = np.asarray(ranks)
    if ranks.shape != (experts,) or ranks.min() < 0 or ranks.max() > min(out, in_) or rounds < 0:
        raise JaxmoeError(
            f"ranks {ranks.tolist()} of {experts} matrices [{out}, {in_}] in {rounds} rounds: give each expert one of 0"
            f" to {min(out, in_)}, and at least 0 rounds"
        )
    weight = jnp.asarray(weight, jnp.float32)
    product, best, errors = jnp.zeros_like(weight), None, []
    for _ in range(rounds + 1):
        rounded = rounding(weight - product)
        rest = weight - rounded.values(store)
        factors = closest_factors(rest, ranks, moment)
        if hold is not None:
            factors = hold(rest, factors)
        product = _product(factors.left, factors.right)
        error = weighted_errors(rest - product, moment)
        own = rounded, factors
        best = own if best is None else _better(np.array(error < np.min(errors, axis=0)), own, best)
        errors.append(error)
        if tolerance is not None and _stopped(np.array(errors), tolerance):
            break
    assert best is not None
    rounded, factors = best
    return Compensated(rounded, factors, np.array(errors))


def closest_factors(
    rest: Float[AnyArray, "expert out in"], ranks: Int[np.ndarray, " expert"], moment: Float[AnyArray, "..."] | None
) -> Factors:
    """Return the closest factors of each expert's rank, in float64 inside, sharing the singular values between them.

    Example:
        >>> found = closest_factors(jnp.array([[[4.0, 0.0], [0.0, 1.0]]]), np.array([1]), None)
        >>> abs(found.left).round(3).ravel().tolist(), abs(found.right).round(3).ravel().tolist()
        ([2.0, 0.0], [2.0, 0.0])
    """
    widest = max(1, int(np.max(ranks)))
    with jax.enable_x64(True):
        moment = None if moment is None else jnp.asarray(moment, jnp.float64)
        left, right = _closest(jnp.asarray(rest, jnp.float64), moment, widest)
        kept = jnp.arange(widest) < np.asarray(ranks)[:, None]
        left, right = jnp.where(kept[:, None], left, 0), jnp.where(kept[:, :, None], right, 0)
        return Factors(left.astype(jnp.float32), right.astype(jnp.float32))


@partial(jax.jit, static_argnames="rank")
def _closest(rest, moment, rank):
    found = weighted_svd(rest, rank=rank, column_moment=moment)
    # Shared by size, not by energy: storage in few bits likes rows of equal sizes.
    size = jnp.sqrt(jnp.linalg.norm(found.right, axis=2) / jnp.maximum(jnp.linalg.norm(found.left, axis=1), 1e-30))
    size = jnp.where(size > 0, size, 1)
    return found.left * size[:, None, :], found.right / size[:, :, None]


def weighted_errors(
    rest: Float[AnyArray, "expert out in"], moment: Float[AnyArray, "..."] | None
) -> Float[np.ndarray, " expert"]:
    """Return ||rest C^(1/2)|| of every expert, computed in float64.

    Example:
        >>> weighted_errors(jnp.array([[[3.0, 4.0]]]), None).tolist()
        [5.0]
    """
    with jax.enable_x64(True):
        moment = None if moment is None else jnp.asarray(moment, jnp.float64)
        return np.asarray(_errors(jnp.asarray(rest, jnp.float64), moment))


@jax.jit
def _errors(rest, moment):
    if moment is None:
        weighted = rest
    elif moment.ndim == 2:
        weighted = rest * moment[:, None]
    else:
        weighted = _product(rest, jnp.broadcast_to(moment, (len(rest), *moment.shape[1:])))
    return jnp.sqrt(jnp.maximum(jnp.sum(weighted * rest, axis=(1, 2)), 0))


def _product(left, right):
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


def _better(better: np.ndarray, new, old):
    """Return for every expert what is better; all arrays have the experts, or as many rows for each, in front."""

    def chosen(new, old):
        rows = jnp.repeat(jnp.asarray(better), new.shape[0] // len(better))
        return jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(chosen, new, old)


def _stopped(errors: np.ndarray, tolerance: float) -> bool:
    if len(errors) <= WINDOW:
        return False
    now, before = errors[-WINDOW:].mean(0), errors[-WINDOW - 1 : -1].mean(0)
    return bool((before - now <= tolerance * before).all())


def excess_kurtosis(weight: Float[AnyArray, "expert out in"]) -> Float[np.ndarray, " expert"]:
    """Return the excess kurtosis of every expert's numbers; 0 for a normal distribution, -3 where all are equal.

        mean((x - mean)^4) / s^4 - 3,        s^2 with one degree of freedom less than there are numbers

    Example:
        >>> excess_kurtosis(np.array([[[-1.0, 1.0, -1.0, 1.0]], [[2.0, 2.0, 2.0, 2.0]]])).tolist()
        [-2.4375, -3.0]
    """
    rows = np.asarray(weight, np.float64).reshape(len(weight), -1)
    centred = rows - rows.mean(1, keepdims=True)
    spread = (centred**2).sum(1) / max(1, rows.shape[1] - 1)
    return np.divide((centred**4).mean(1), spread**2, out=np.zeros(len(rows)), where=spread > 0) - 3


def published_ranks(kurtosis: Float[np.ndarray, " expert"], *, addend: int = 2) -> Int[np.ndarray, " expert"]:
    """Return MiLo's ranks: 2^(kurtosis + addend), kurtosis rounded; 0 where it is below 1, 1024 where it is above 9.

    Example:
        >>> published_ranks(np.array([0.4, 0.6, 3.2, 12.0])).tolist()
        [0, 8, 32, 1024]
    """
    whole = np.round(kurtosis).astype(np.int64)
    return np.where(whole < 1, 0, np.where(whole > 9, 1024, 2 ** (np.clip(whole, 0, 9) + addend)))
