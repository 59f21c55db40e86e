"""Remove whole experts or intermediate channels: which ones stay, and what the rest makes of it.

An intermediate channel j of an expert is row j of gate and of up with column j of down. What is kept is always in
ascending order, so that files differ from the source only by what is missing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from jaxmoe.arrays import AnyArray, Scalar
from jaxmoe.errors import JaxmoeError
from jaxmoe.solvers.decompositions import cholesky, solve_lower


def keep_best(score: Num[np.ndarray, "*unit candidate"], keep: int, groups: int = 1) -> Int[np.ndarray, "*unit keep"]:
    """Return the candidates of the highest scores, in ascending order; of equal scores the first.

    Args:
        score: `[..., candidate]`.
        keep: how many stay.
        groups: equal parts of the candidates, of each of which as many stay.

    Raises:
        JaxmoeError: the groups do not divide the numbers, or there are not so many candidates.

    Example:
        >>> score = np.array([3.0, 5.0, 1.0, 2.0])
        >>> keep_best(score, 2).tolist(), keep_best(score, 2, groups=2).tolist()
        ([0, 1], [1, 3])
        >>> keep_best(np.array([[1.0, 1.0, 1.0]]), 2).tolist()
        [[0, 1]]
    """
    score = np.asarray(score)
    candidates = score.shape[-1]
    if not 1 <= keep <= candidates or candidates % groups or keep % groups:
        raise JaxmoeError(f"{keep} of {candidates} in {groups} groups: give a number that the groups divide")
    parts = score.reshape(*score.shape[:-1], groups, candidates // groups)
    order = np.argsort(-parts, axis=-1, kind="stable")[..., : keep // groups]
    offsets = np.arange(groups)[:, None] * (candidates // groups)
    return np.sort(order + offsets, axis=-1).reshape(*score.shape[:-1], keep)


def damped(moment: Float[AnyArray, "expert side side"], ridge: Scalar) -> Float[Array, "expert side side"]:
    """Return C + r mean(diag C) I, which can be inverted; the identity where C is all zero.

    Example:
        >>> damped(jnp.array([[[2.0]], [[0.0]]]), 0.5).ravel().tolist()
        [3.0, 1.0]
    """
    mean = jnp.diagonal(moment, axis1=1, axis2=2).mean(1)
    added = jnp.where(mean > 0, ridge * mean, 1.0)
    return jnp.asarray(moment) + added[:, None, None] * jnp.eye(moment.shape[1], dtype=moment.dtype)


@jax.jit
def ridge_leverage(moment: Float[AnyArray, "expert channel channel"], ridge: Scalar) -> Float[Array, "expert channel"]:
    """Return how much every channel is needed to span what the others do not: diag((C + r mean(diag C) I)^-1 C).

    Args:
        moment: C, second moment of the intermediate activations, `[expert, channel, channel]`.
        ridge: r, above 0.

    Returns:
        `[expert, channel]`, in [0, 1]; 0 for a channel that is never active.

    Source:
        MoDeGPT, arXiv 2408.09632, for the MLP.

    Example:
        >>> [round(float(x), 3) for x in ridge_leverage(jnp.diag(jnp.array([1.0, 1.0, 0.0]))[None], 0.5)[0]]
        [0.75, 0.75, 0.0]
    """
    solved = _solve(damped(moment, ridge), moment)
    return jnp.clip(jnp.diagonal(solved, axis1=1, axis2=2), 0, 1)


@jax.jit
def nystrom_down(
    down: Float[AnyArray, "expert hidden channel"],
    moment: Float[AnyArray, "expert channel channel"],
    kept: Int[AnyArray, "expert keep"],
) -> Float[Array, "expert hidden keep"]:
    """Return the down projection that makes the best of the channels that stay: down C[:, S] C[S, S]^-1.

    That is the least-squares fit of the expert's output on the kept activations.

    Args:
        down: `[expert, hidden, channel]`.
        moment: C, second moment of the intermediate activations, positive definite, `[expert, channel, channel]`.
        kept: S, `[expert, keep]`.

    Source:
        MoDeGPT, arXiv 2408.09632, for the MLP.

    Example:
        >>> down, alike = jnp.array([[[1.0, 1.0]]]), jnp.array([[[1.0, 0.5], [0.5, 1.0]]])
        >>> nystrom_down(down, alike, jnp.array([[0]])).tolist()
        [[[1.5]]]
    """
    rows = jnp.take_along_axis(moment, kept[:, :, None], axis=1)
    square = jnp.take_along_axis(rows, kept[:, None, :], axis=2)
    target = jnp.einsum("ekc,ehc->ekh", rows, down, precision=lax.Precision.HIGHEST)
    return jnp.swapaxes(_solve(square, target), 1, 2)


@functools.partial(jax.jit, static_argnames="keep")
def greedy_channels(
    down: Float[AnyArray, "expert hidden channel"], moment: Float[AnyArray, "expert channel channel"], *, keep: int
) -> Int[Array, "expert keep"]:
    """Choose channels one after another, each time the one that most lowers the error of the refitted output.

        error(S) = tr down (C - C[:, S] C[S, S]^-1 C[S, :]) down'

    Args:
        down: `[expert, hidden, channel]`.
        moment: C, second moment of the intermediate activations, positive definite, `[expert, channel, channel]`.
        keep: how many channels stay.

    Returns:
        `[expert, keep]`, ascending.

    Example:
        >>> down = jnp.array([[[1.0, 1.0, 0.5]]])  # the first two nearly agree, the third is on its own
        >>> moment = jnp.array([[[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        >>> greedy_channels(down, moment, keep=2).tolist()
        [[0, 2]]
    """
    # One expert at a time: its matrices stay in the cache.
    return lax.map(lambda own: _greedy(*own, keep=keep), (down, moment))


def _greedy(down, moment, *, keep):
    """Eliminate the chosen channel from C and from down C, as a step of Cholesky's decomposition does."""
    floor = jnp.finfo(moment.dtype).eps * 100 * jnp.diagonal(moment)

    def step(index, state):
        rest, says, order = state
        left = jnp.diagonal(rest)
        # What the chosen ones span already cannot gain more.
        gain = jnp.where(left > floor, (says**2).sum(0) / jnp.maximum(left, floor), 0.0)
        best = jnp.argmax(jnp.where(order < keep, -1.0, gain))
        column, said = rest[:, best], says[:, best]
        scale = jnp.where(left[best] > floor[best], 1 / left[best], 0.0)
        rest = rest - jnp.outer(column, column) * scale
        says = says - jnp.outer(said, column) * scale
        return rest, says, order.at[best].set(index)

    says = jnp.matmul(down, moment, precision=lax.Precision.HIGHEST)
    _, _, order = lax.fori_loop(0, keep, step, (moment, says, jnp.full(moment.shape[0], keep)))
    return jnp.sort(jnp.argsort(order)[:keep])


def _solve(matrix, target):
    factor = cholesky(matrix)
    return solve_lower(factor, solve_lower(factor, target), transpose=True)
