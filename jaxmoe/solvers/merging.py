"""One base for the experts of a layer: the matrix that they have in common, merged by several rules.

    minimise  sum_e u_e (W_e - B)^2, entry by entry:        B  =  sum_e u_e W_e / sum_e u_e

    mean          u_e = 1                     freq         u_e = z_e, routed tokens
    fisher        u_e = I_e, element-wise     fisher_freq  u_e = z_e I_e           (I: squared gradients, shaped like W)

RegMean weighs by second moments, u_e = C_e, a matrix; TIES lets the experts vote on every entry. `shared_energy` says
what a base explains: where it is near 0 the experts have nothing in common, and a base costs numbers for nothing.

Cost: `regmean` solves one system of the input size, the others read the weights a few times. It factors no deltas.
Source: D²-MoE, arXiv 2502.17298; its paper merges by `fisher`, its released code by `fisher_freq`.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.solvers.decompositions import solve
from jaxmoe.solvers.second_moment import check_moment

MergeMethod = Literal["fisher", "fisher_freq", "freq", "mean"]

RIDGE = 1e-3
"""What `regmean` adds to every direction of every expert, in units of the mean eigenvalue over all experts.

It bounds the condition number by the number of inputs over the ridge, which float32 still solves.
"""


def merge(
    weight: Float[AnyArray, "expert out in"],
    *,
    method: MergeMethod = "fisher",
    fisher: Num[AnyArray, "expert out in"] | None = None,
    counts: Num[AnyArray, " expert"] | None = None,
) -> Float[Array, "out in"]:
    """Return the weighted average of the experts, entry by entry.

    Where an entry's weights sum to zero (no expert's gradient ever reached it), the average by routed tokens stands in;
    without counts, or if no token was counted, the mean.

    Args:
        weight: the matrices, `[expert, out, in]`.
        method: see the module.
        fisher: squared gradients, at least 0, `[expert, out, in]`; needed by "fisher" and "fisher_freq".
        counts: routed tokens, `[expert]`; needed by "freq" and "fisher_freq", used by "fisher" to stand in.

    Returns:
        `[out, in]`, at least float32. Subtract it as it will be stored, rounded, to get the deltas.

    Raises:
        JaxmoeError: the method is unknown, what it needs is missing, or shapes differ.

    Source:
        D²-MoE, arXiv 2502.17298; what stands in is ours, where the released code divides 0 by 0.

    Example:
        >>> weight = jnp.array([[[1.0, 1.0]], [[3.0, 3.0]]])
        >>> merge(weight, fisher=jnp.array([[[3.0, 0.0]], [[1.0, 0.0]]]), counts=jnp.array([0, 5])).tolist()
        [[1.5, 3.0]]
    """
    _check_merge(weight, method, fisher, counts)
    weight = _widened(weight)
    base = _mean(weight)
    if method == "mean":
        return base
    routed = None if counts is None else jnp.asarray(counts, weight.dtype)[:, None, None]
    if routed is not None:
        base = _average(weight, routed, otherwise=base)
    if method == "freq":
        return base
    say = jnp.asarray(fisher, weight.dtype)
    if routed is not None and method == "fisher_freq":
        say = _in_units(say) * _in_units(routed)
    return _average(weight, say, otherwise=base)


def regmean(
    weight: Float[AnyArray, "expert out in"], moments: Num[AnyArray, "expert in in"], *, ridge: float = RIDGE
) -> Float[Array, "out in"]:
    """Return the base whose outputs are closest to those of the experts, each on its own inputs.

        minimise  sum_e tr((W_e - B) C_e (W_e - B)')        B  =  (sum_e W_e C_e) (sum_e C_e)^-1

    with C_e = moments_e + ridge c 1, c the mean eigenvalue of all moments: directions that no input has are averaged.

    Args:
        weight: the matrices, `[expert, out, in]`.
        moments: sums of x x' over the tokens of each expert, symmetric, `[expert, in, in]`.
        ridge: relative to c, positive; 0 asks for sums of moments that are not singular.

    Returns:
        `[out, in]`, at least float32; the mean of the experts if all moments are zero.

    Raises:
        JaxmoeError: shapes that do not match.

    Source:
        RegMean, arXiv 2212.09849, section 3. It scales off-diagonal entries by 0.9 in place of the ridge.

    Example:
        >>> weight, moments = jnp.array([[[1.0]], [[4.0]]]), jnp.array([[[2.0]], [[1.0]]])
        >>> regmean(weight, moments, ridge=0.0).tolist()
        [[2.0]]
    """
    experts, _, in_ = weight.shape
    if moments.shape != (experts, in_, in_):
        raise JaxmoeError(f"moments {tuple(moments.shape)}: give one for each expert, [{experts}, {in_}, {in_}]")
    weight = _widened(weight)
    moments = jnp.asarray(moments, weight.dtype)
    level = jnp.trace(moments, axis1=1, axis2=2).mean() / in_
    moments = moments / jnp.where(level > 0, level, 1.0)
    added = jnp.where(level > 0, ridge, 1.0) * jnp.eye(in_, dtype=weight.dtype)
    mean = _mean(weight)
    # Solved for what is to be added to the mean, to which the ridge then draws; its deviations sum to zero, so that the
    # ridge is on the left side only, and rounding is relative to the deviations.
    moved = jnp.einsum("eoi,eij->oj", weight - mean, moments, precision=lax.Precision.HIGHEST)
    return mean + solve(moments.sum(0) + experts * added, moved.T).T


def ties(
    weight: Float[AnyArray, "expert out in"], *, density: float = 0.2, scale: float = 1.0
) -> Float[Array, "out in"]:
    """Return the mean moved to where the larger deviations agree: trim, elect a sign, average those that have it.

        t_e = W_e - mean, its `density` largest entries, else 0        s = sign(sum_e t_e)        B = mean + scale m
        m   = mean of those t_e that are not 0 and have sign s, entry by entry; 0 if there are none

    The published rule merges models fine-tuned from one; experts have no such origin, so the mean is read as it. The
    deviations from it sum to zero: untrimmed they elect no sign, and the base is the mean.

    Args:
        weight: the matrices, `[expert, out, in]`.
        density: kept fraction of every expert's entries, in (0, 1]; at least one is kept, more where sizes are equal.
        scale: of what is added to the mean.

    Returns:
        `[out, in]`, at least float32.

    Raises:
        JaxmoeError: the density is out of range.

    Source:
        TIES-Merging, arXiv 2306.01708, section 4.

    Example:
        >>> weight = jnp.array([[[4.0, 0.0]], [[-1.0, 0.0]], [[0.0, 3.0]]])
        >>> ties(weight, density=0.5).tolist()
        [[4.0, 3.0]]
    """
    if not 0 < density <= 1:
        raise JaxmoeError(f"density {density}: give a fraction above 0, at most 1")
    weight = _widened(weight)
    mean = _mean(weight)
    deltas = weight - mean
    sizes = abs(deltas).reshape(len(weight), -1)
    kept = max(1, round(density * sizes.shape[1]))
    least = jnp.sort(sizes, axis=1)[:, -kept][:, None, None]
    trimmed = jnp.where(abs(deltas) >= least, deltas, 0.0)
    total = trimmed.sum(0)
    # Deviations that cancel leave what rounding made of them, which elects nothing.
    noise = 4 * len(weight) * jnp.finfo(weight.dtype).eps * abs(weight).sum(0)
    elected = jnp.where(abs(total) > noise, jnp.sign(total), 0.0)
    agree = trimmed * elected > 0
    merged = jnp.where(agree, trimmed, 0.0).sum(0) / jnp.maximum(agree.sum(0), 1)
    return mean + scale * merged


def shared_energy(
    weight: Float[AnyArray, "expert out in"],
    base: Float[AnyArray, "out in"],
    moments: Num[AnyArray, "one_or_expert in in"] | None = None,
) -> Float[Array, ""]:
    """Return the fraction of the experts' energy that a base explains.

        1 - sum_e || (W_e - B) C_e^(1/2) ||^2 / sum_e || W_e C_e^(1/2) ||^2,        not below 0

    Unrelated experts of equal size share about 1 / E with their mean: no more than that means nothing in common.

    Args:
        weight: the matrices, `[expert, out, in]`.
        base: `[out, in]`.
        moments: second moments of the inputs, `[1|expert, in, in]`; None for an unweighted average.

    Returns:
        A fraction in [0, 1]: 1 if all experts are the base, 0 if it explains nothing or there is no energy.

    Raises:
        JaxmoeError: shapes that do not match.

    Example:
        >>> weight = jnp.array([[[3.0, 1.0]], [[3.0, -1.0]]])
        >>> round(float(shared_energy(weight, weight.mean(0))), 6)
        0.9
    """
    experts, out, in_ = weight.shape
    check_moment("moments", moments, experts, in_)
    if base.shape != (out, in_):
        raise JaxmoeError(f"base {tuple(base.shape)} of experts [{out}, {in_}]: give one of their shape")
    weight = _widened(weight)
    remainder = weight - base
    if moments is not None:
        moments = jnp.asarray(moments, weight.dtype)
        # Energies in units of the moments, so that sums of many tokens do not overflow.
        moments = _in_units(jnp.broadcast_to(moments, (experts, in_, in_)))

    def energy(matrices):
        seen = matrices
        if moments is not None:
            seen = jnp.einsum("eoi,eij->eoj", matrices, moments, precision=lax.Precision.HIGHEST)
        return (matrices * seen).sum()

    whole = energy(weight)
    return jnp.where(whole > 0, jnp.clip(1 - energy(remainder) / jnp.where(whole > 0, whole, 1.0), 0, 1), 0.0)


def _widened(weight):
    return jnp.asarray(weight, jnp.promote_types(jnp.asarray(weight).dtype, jnp.float32))


def _in_units(values):
    """Return values of at least 0 in units of the largest; Fisher information is too small for products of it."""
    largest = abs(values).max()
    return values / jnp.where(largest > 0, largest, 1.0)


def _mean(weight):
    """Return the mean of the experts; of equal experts it is each of them, to the last bit."""
    return weight[0] + (weight - weight[0]).mean(0)


def _average(weight, say, *, otherwise):
    """Return sum say W / sum say, entry by entry; `otherwise` where no expert has a say."""
    most = say.max(0)
    # Below it, float32 has too few digits left to divide by.
    heard = most > jnp.finfo(weight.dtype).tiny
    say = say / jnp.where(heard, most, 1.0)
    total = jnp.where(heard, say.sum(0), 1.0)
    # Around the mean, so that experts which are alike give themselves, whatever their say.
    centre = _mean(weight)
    return jnp.where(heard, centre + (say * (weight - centre)).sum(0) / total, otherwise)


def _check_merge(weight, method, fisher, counts):
    if method not in get_args(MergeMethod):
        raise JaxmoeError(f"unknown merge {method!r}: give one of {', '.join(get_args(MergeMethod))}")
    problems = []
    if fisher is None and method in ("fisher", "fisher_freq"):
        problems.append(f"{method} needs the Fisher information: calibrate with gradients, or merge by freq")
    if counts is None and method in ("freq", "fisher_freq"):
        problems.append(f"{method} needs counts of routed tokens: calibrate, or merge by mean")
    for name, found, wanted in (("fisher", fisher, weight.shape), ("counts", counts, weight.shape[:1])):
        if found is not None and found.shape != wanted:
            problems.append(f"{name} {tuple(found.shape)}: give {list(wanted)}")
    if problems:
        raise JaxmoeError("; ".join(problems))
