"""Shifts of bits inside of matrices: one bit more for some groups of columns, one less for as many others.

    maximise  sum_(label = 1) gain_k  -  sum_(label = -1) loss_k        with as many of the one as of the other

The mean stays what it was, and so do the bytes, since all groups have the same size. What a group gains and loses can
be measured, by error feedback at either width (`group_errors`, `paired_shifts`); or guessed from its salience, by which
the published rule orders the groups of one matrix (`salience`, `ranked_shifts`).
Source: SliM-LLM, arXiv 2405.14917, sections 3.2 and 3.3; pairs over several matrices are ours.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.quantised import held_scales, held_zeros
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.solvers.error_feedback import Factored, factored
from jaxmoe.solvers.rounding import Grid, fit_scale


def salience(
    weight: Float[AnyArray, "expert out in"],
    moment: Float[AnyArray, "..."],
    *,
    group: int,
    damping: float = 0.01,
) -> Float[Array, "expert group"]:
    """Return the mean of W_ij^2 / U_jj^2 over each group of columns; H^-1 = UᵀU with U upper triangular.

    Args:
        weight: the matrices W.
        moment: second moment of their inputs, `[1|expert, in, in]`; H is it with `damping` times its mean diagonal on
            its own.
        group: columns of a group; it divides the row.
        damping: positive where the moment may be singular.

    Source:
        SliM-LLM, equation 3; its released code damps twice, the second time by an absolute number.

    Example:
        >>> weight, moment = jnp.array([[[1.0, 2.0], [3.0, -1.0]]]), jnp.array([[[2.0, 1.0], [1.0, 2.0]]])
        >>> (2 * salience(weight, moment, group=1, damping=0)).round(4).tolist()
        [[15.0, 10.0]]
    """
    factor = factored(moment, damping=damping)
    squares = jnp.mean(jnp.asarray(weight, jnp.float32) ** 2, axis=1) * factor.diagonal**2
    return jnp.mean(squares.reshape(len(squares), -1, group), axis=2)


def group_errors(
    rest: Float[AnyArray, "expert out in"], factor: Factored, *, group: int
) -> Float[Array, "expert group"]:
    """Return what each group of columns adds to tr (rest H restᵀ): with H = R Rᵀ, the squares of its columns of rest R.

    For the rest that error feedback leaves, these are the squared errors of its steps: what a column of given bits
    costs when all errors before it are counted, and none behind.

    Args:
        rest: W less its rounding.
        factor: of H, in the order in which the columns were rounded.
        group: columns of a group; it divides the row.

    Example:
        >>> factor = factored(jnp.array([[[2.0, 1.0], [1.0, 2.0]]]), damping=0)
        >>> errors = group_errors(jnp.array([[[1.0, 1.0]]]), factor, group=1)
        >>> errors.round(4).tolist()
        [[1.5, 4.5]]
    """
    return _group_errors(jnp.asarray(rest, jnp.float32), factor, group)


@partial(jax.jit, static_argnames="group")
def _group_errors(rest, factor, group):
    experts, _, in_ = rest.shape
    order = jnp.broadcast_to(factor.order, (experts, in_))
    columns = jnp.take_along_axis(rest, order[:, None], axis=2)
    root = jnp.broadcast_to(factor.unit * factor.diagonal[:, None], (experts, in_, in_))
    steps = jnp.matmul(columns, root, precision=lax.Precision.HIGHEST)
    squares = jnp.zeros((experts, in_)).at[jnp.arange(experts)[:, None], order].set(jnp.sum(steps**2, axis=1))
    return jnp.sum(squares.reshape(experts, -1, group), axis=2)


def paired_shifts(gain: Float[np.ndarray, " group"], loss: Float[np.ndarray, " group"]) -> Int[np.ndarray, " group"]:
    """Return the shift of every group, 1, 0 or -1: highest gains in pairs with lowest losses, while a pair is worth it.

    Exact wherever losing a bit costs a group more than another one brings it, loss >= gain; a heuristic otherwise.

    Args:
        gain: by how much the objective falls where a group has one bit more.
        loss: by how much it rises where it has one less.

    Returns:
        As many 1 as -1. Of equal groups the first come first.

    Raises:
        JaxmoeError: there are not as many losses as gains, or some are not finite.

    Example:
        >>> paired_shifts(np.array([6.0, 1.0, 3.0, 2.0]), np.array([9.0, 0.5, 4.0, 1.5])).tolist()
        [1, -1, 1, -1]
    """
    gain, loss = np.asarray(gain, np.float64), np.asarray(loss, np.float64)
    if gain.shape != loss.shape or not (np.isfinite(gain).all() and np.isfinite(loss).all()):
        raise JaxmoeError(f"gains {gain.shape} and losses {loss.shape}: give finite ones of the same groups")
    shifts = np.zeros(len(gain), int)
    up, down = np.argsort(-gain, kind="stable"), np.argsort(loss, kind="stable")
    while True:
        up, down = up[shifts[up] == 0], down[shifts[down] == 0]
        if len(up) < 2:
            return shifts
        pairs = [(up[0], down[0])] if up[0] != down[0] else [(up[0], down[1]), (up[1], down[0])]
        best = max(pairs, key=lambda pair: gain[pair[0]] - loss[pair[1]])
        if gain[best[0]] <= loss[best[1]]:
            return shifts
        shifts[best[0]], shifts[best[1]] = 1, -1


def ranked_shifts(salience: Float[np.ndarray, " group"], pairs: int) -> Int[np.ndarray, " group"]:
    """Return the shifts by rank: one bit less for so many groups of lowest salience, one more for those of highest.

    Source:
        SliM-LLM, section 3.2.

    Raises:
        JaxmoeError: there are not so many groups.

    Example:
        >>> ranked_shifts(np.array([5.0, 1.0, 9.0, 2.0]), 1).tolist()
        [0, -1, 1, 0]
    """
    if not 0 <= 2 * pairs <= len(salience):
        raise JaxmoeError(f"{pairs} pairs of {len(salience)} groups: give 0 to {len(salience) // 2}")
    order, shifts = np.argsort(salience, kind="stable"), np.zeros(len(salience), int)
    shifts[order[:pairs]] = -1
    shifts[order[len(order) - pairs :]] = 1
    return shifts


def two_levels(
    groups: Float[AnyArray, "expert out group number"], store: Store
) -> tuple[Float[Array, "expert out group"], Float[Array, "expert out group"]]:
    """Return scales and real zeros of one bit: the mean of a group, and its mean distance from it to either side.

        W = s (q - z):        s = 2 mean |x - mean|,        s (0 - z) = mean - s / 2

    Args:
        groups: the numbers of each group along the last axis.
        store: of real zeros.

    Source:
        The binarisation of XNOR-Net, arXiv 1603.05279, about the mean. SliM-LLM's released code adds the mean to a
        binarisation about zero.

    Example:
        >>> group = jnp.array([1.0, 2.0, 3.0, -2.0]).reshape(1, 1, 1, 4)
        >>> scale, zero = two_levels(group, Store(bits=1, zero="real", scale="float32"))
        >>> [(scale * (code - zero)).round(4).item() for code in (0, 1)]
        [-0.5, 2.5]
    """
    x = jnp.asarray(groups, jnp.float32)
    mean = jnp.mean(x, axis=-1)
    spread = jnp.mean(jnp.abs(x - mean[..., None]), axis=-1)
    # Equal numbers are one step from zero.
    scale = jnp.where(spread > 0, 2 * spread, jnp.abs(mean))
    scale = held_scales(jnp.where(scale > 0, scale, 1), store)
    return scale, held_zeros(jnp.where(spread > 0, 0.5, 0) - mean / scale, store)


def calibrated(
    blocks: Float[AnyArray, "block out in"], store: Store, *, reach: float = 0.1, steps: int = 50, say: float = 0.1
) -> Rounded:
    """Round blocks of one group a row on scales that count salient numbers apart.

        minimise  sum (x - s (q - z))^2 over ordinary numbers  +  say * the same over those beyond three deviations

    Args:
        blocks: each row is a group.
        store: uniform codes, in groups of a whole row.
        reach: scales are those of the span times 1 - reach to 1 + reach.
        steps: on either side of 1.
        say: of salient numbers.

    Source:
        SliM-LLM, section 3.3. In its released code salient numbers weigh like all others.

    Example:
        >>> store = Store(bits=2, group=4, scale="float32")
        >>> calibrated(jnp.array([[[0.2, 0.5, 0.9, 0.4]]]), store).codes.tolist()
        [[[1, 2, 3, 1]]]
    """
    x = jnp.asarray(blocks, jnp.float32)
    centred = x - jnp.mean(x, axis=2, keepdims=True)
    salient = jnp.abs(centred) > 3 * jnp.sqrt(jnp.mean(centred**2, axis=2, keepdims=True))
    weights = jnp.where(salient, say, 1.0)

    def tried(share):
        scale, zero = (None if own is None else own[..., None] for own in fit_scale(x, store, share=share))
        code, value = Grid(scale, zero).nearest(x, store)
        return code, scale, zero, jnp.sum(weights * (value - x) ** 2, axis=2, keepdims=True)

    def better(best, share):
        own = tried(share)
        lower = own[3] < best[3]
        return jax.tree.map(lambda new, old: jnp.where(lower, new, old), own, best), None

    # The span itself first: of equal errors it is kept.
    shares = 1 + reach * np.arange(1, steps + 1) / steps
    (codes, scale, zero, _), _ = lax.scan(better, tried(1.0), jnp.asarray([*(2 - shares), *shares], jnp.float32))
    return Rounded(codes, scale, zero)
