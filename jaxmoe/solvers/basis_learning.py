"""Basis learning as published: Adam on coefficients, bases and mixing at once.

    minimise  sum_e u_e ||T_e - A_e f(sum_j alpha_ej B_j)||²,    T = W / sigma  or  (W - mu) / sigma

with alpha the softmax of free logits (or free itself), full batch, constant rate. The whole fit is one loop on the
device with a gradient written by hand; best loss and its parameters are tracked by evaluate, compare, then step. One
step costs 6 E r Q (M + P) operations, and the loop holds five copies of (A, B, alpha) beside three arrays of
[E, r, Q].

Source: MoBE, arXiv 2508.05257, and what is known of its authors' code: weights are divided by their standard deviation
only, the rate is .07 without decay, and the bases start at the SVD of consecutive blocks of experts with one-hot
*logits*, so that the first blend is almost uniform and the first output almost zero. That looks like a fault and is
what works: sharper starts stall.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.shared_basis import ACTIVATIONS
from jaxmoe.solvers.descent import begin, descend
from jaxmoe.solvers.mixture import (
    HIGHEST,
    BasisFit,
    Ragged,
    activate,
    blend,
    block_svd,
    check_sizes,
    location_and_scale,
    owners,
    pull_back,
    reconstruct,
    relative_errors,
    solve_coefficients,
    squared_norms,
    weigh,
    whiten_rows,
)
from jaxmoe.solvers.second_moment import check_moment


def learn_basis(
    weight: Float[AnyArray, "expert row column"],
    *,
    bases: int,
    rank: int,
    activation: str = "silu",
    mixing: str = "softmax",
    initial: str = "svd",
    normalize: str = "std",
    start_scale: float | None = None,
    groups: int = 1,
    learning_rate: float = 0.07,
    steps: int = 50_000,
    patience: int | None = 2_000,
    moment: Float[AnyArray, "_ column column"] | None = None,
    row_moment: Float[AnyArray, "_ row row"] | None = None,
    expert_weight: Float[AnyArray, " expert"] | None = None,
    resolve: bool = False,
    ragged: Ragged | None = None,
    key: Array | None = None,
) -> BasisFit:
    """Fit a mixture of bases by the published algorithm.

    Args:
        weight: the experts' matrices; bases span the columns.
        bases: M, 1 to the number of experts.
        rank: r, 1 to min(row, column).
        activation: f, a name in `ACTIVATIONS`.
        mixing: "softmax" of logits as published, or "free" coefficients of any sign.
        initial: "svd" of consecutive blocks of experts as published, or "random".
        normalize: "std" divides by the standard deviation of all entries, "zscore" also removes their mean (kept in the
            result), "none" leaves the weights.
        start_scale: factor on the starting coefficients in normalised units. None is as published: sigma, the SVD of
            raw weights. A number (0.02 is sigma of usual checkpoints) makes the fit equivariant to the weights' scale.
        groups: number of consecutive groups of experts that are fitted apart, with `bases / groups` bases each.
        learning_rate: of Adam(.9, .999, 1e-8).
        steps: upper limit; 0 returns the start.
        patience: stop after so many steps without a new best loss; None never stops early.
        moment: second moment of the inputs along the columns, `[1|expert, column, column]`; None for an
            unweighted error.
        row_moment: the same along the rows, `[1|expert, row, row]` (for matrices fitted transposed).
        expert_weight: u_e, relative weight of every expert's error.
        resolve: whether A is finally solved exactly for the bases found.
        ragged: unequal ranks of the bases, the largest of them `rank`; None for equal ones.
        key: random key, needed by the random start only.

    Returns:
        The best parameters seen, in the weights' own scale.

    Raises:
        JaxmoeError: sizes or names that cannot be fitted.

    Example:
        >>> weight = jax.random.normal(jax.random.key(0), (4, 3, 8))
        >>> fit = learn_basis(weight, bases=2, rank=3, steps=50)
        >>> fit.coefficients.shape, bool(fit.losses[-1] < fit.losses[0])
        ((4, 3, 3), True)
    """
    check_sizes(weight.shape, bases, rank, activation, ragged)
    check_moment("moment", moment, weight.shape[0], weight.shape[2])
    check_moment("row_moment", row_moment, weight.shape[0], weight.shape[1])
    for name, value, known in (
        ("mixing", mixing, ("softmax", "free")),
        ("initial", initial, ("svd", "random")),
        ("normalize", normalize, ("std", "zscore", "none")),
    ):
        if value not in known:
            raise JaxmoeError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
    if groups > 1 and ragged is not None:
        raise JaxmoeError(f"{groups} groups with unequal ranks: fit every group by itself")
    if groups > 1 and (bases % groups or groups > weight.shape[0]):
        raise JaxmoeError(f"{groups} groups of {weight.shape[0]} experts with {bases} bases: bases must divide evenly")
    as_float = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    return _learn(
        *as_float((weight, moment, row_moment, expert_weight, learning_rate)),
        jax.random.key(0) if key is None else key,
        ragged,
        bases=bases,
        rank=rank,
        activation=activation,
        mixing=mixing,
        initial=initial,
        normalize=normalize,
        start_scale=start_scale,
        groups=groups,
        steps=steps,
        patience=patience,
        resolve=resolve,
    )


@partial(
    jax.jit,
    static_argnames=(
        "bases",
        "rank",
        "activation",
        "mixing",
        "initial",
        "normalize",
        "start_scale",
        "groups",
        "steps",
        "patience",
        "resolve",
    ),
)
def _learn(
    weight,
    moment,
    row_moment,
    shares,
    rate,
    key,
    ragged,
    *,
    bases,
    activation,
    normalize,
    start_scale,
    groups,
    resolve,
    **options,
) -> BasisFit:
    """Normalise, fit every group of experts, and bring the result back to the weights' own scale."""
    experts = weight.shape[0]
    shares = jnp.ones(experts) if shares is None else shares
    mean, sigma = location_and_scale(weight)
    mean = mean if normalize == "zscore" else jnp.zeros_like(mean)
    constant = sigma == 0
    sigma = jnp.where(constant | (normalize == "none"), 1.0, sigma)
    target = (weight - mean) / sigma
    fitted = whiten_rows(target, row_moment)
    scale = sigma if start_scale is None else start_scale
    blocks = owners(experts, groups)
    parts = []
    for group in range(groups):
        members = np.flatnonzero(blocks == group) if groups > 1 else slice(None)
        own = moment[members] if moment is not None and moment.shape[0] == experts else moment
        part = _fit(
            fitted[members],
            own,
            shares[members],
            scale,
            rate,
            jax.random.fold_in(key, group),
            ragged,
            bases=bases // groups,
            activation=activation,
            **options,
        )
        parts.append(part)
    (coefficients, basis, alpha), losses, taken, diverged = _join(parts, fitted, shares, blocks, moment)
    if resolve or row_moment is not None:
        coefficients = solve_coefficients(target, basis, alpha, activation=activation, moment=moment, ragged=ragged)
    # A constant has no scale to learn at: one base of ones stands for it exactly.
    level = weight[0, 0, 0] - mean
    ones = jnp.zeros_like(coefficients).at[..., 0].set(level / ACTIVATIONS[activation](jnp.ones(())))
    coefficients = jnp.where(constant, ones, coefficients * sigma)
    basis = jnp.where(constant, 1.0, basis)
    alpha = jnp.where(constant, jax.nn.one_hot(jnp.zeros(experts, int), bases), alpha)
    approximation = reconstruct(coefficients, basis, alpha, activation) + mean
    error = relative_errors(whiten_rows(weight, row_moment), whiten_rows(approximation, row_moment), moment)
    return BasisFit(
        coefficients, basis, alpha, mean, error, losses, taken, jnp.full(3, rate), jnp.zeros((), jnp.int32), diverged
    )


def _fit(
    target, moment, shares, scale, rate, key, ragged, *, bases, rank, activation, mixing, initial, steps, patience
):
    """Return the best (A, B, alpha) in normalised units, losses, steps taken and whether the loss broke."""
    start = _start(target, bases, rank, mixing, initial, scale, key, ragged)
    mix = partial(jax.nn.softmax, axis=-1) if mixing == "softmax" else lambda x: x
    energy = jnp.sum(shares * squared_norms(target, moment))
    whole = jnp.where(energy > 0, energy, 1.0)
    # Adam's 1e-8 is felt relative to the gradient: it sees the published mean over all entries.
    spread = 1.0 if moment is None else jnp.trace(moment, axis1=-2, axis2=-1).mean() / moment.shape[-1]
    per_entry = shares[:, None, None] * (2.0 / (jnp.mean(shares) * spread * target.size))

    def evaluate(parameters):
        coefficients, basis, logits = parameters
        alpha, d_softmax = jax.vjp(mix, logits)
        features, slope = activate(blend(alpha, basis), activation)
        if ragged is not None:
            used = ragged.of_experts(rank)
            features, slope = features * used, slope * used
        residual = jnp.matmul(coefficients, features, precision=HIGHEST) - target
        weighed = weigh(residual, moment)
        loss = jnp.sum(shares * jnp.sum(weighed * residual, axis=(1, 2))) / whole
        weighed = weighed * per_entry
        d_coefficients = jnp.matmul(weighed, jnp.swapaxes(features, 1, 2), precision=HIGHEST)
        d_features = jnp.matmul(jnp.swapaxes(coefficients, 1, 2), weighed, precision=HIGHEST)
        d_basis, d_alpha = pull_back(d_features * slope, alpha, basis)
        if ragged is not None:
            d_basis = d_basis * ragged.of_bases(rank)
        return loss, (d_coefficients, d_basis, d_softmax(d_alpha)[0])

    adam = optax.scale_by_adam()
    end = descend(evaluate, begin(start, adam, rate=rate, steps=steps), adam, patience=patience)
    coefficients, basis, logits = end.best
    if ragged is not None:
        # What lies beyond an expert's rank was multiplied by nothing.
        coefficients = coefficients * jnp.swapaxes(ragged.of_experts(rank), 1, 2)
    return (coefficients, basis, mix(logits)), end.losses, end.steps, end.diverged


def _start(target, bases, rank, mixing, initial, scale, key, ragged):
    experts, rows, columns = target.shape
    if initial == "svd":
        coefficients, basis = block_svd(target, bases, rank, ragged)
        logits = jax.nn.one_hot(owners(experts, bases) if ragged is None else ragged.owner, bases)
        return coefficients * scale, basis, logits
    keys = jax.random.split(key, 3)
    coefficients = scale * jax.random.normal(keys[0], (experts, rows, rank))
    basis = jax.random.normal(keys[1], (bases, rank, columns)) / columns**0.5
    if ragged is not None:
        basis = basis * ragged.of_bases(rank)
    logits = jax.random.normal(keys[2], (experts, bases)) * (1.0 if mixing == "softmax" else bases**-0.5)
    return coefficients, basis, logits


def _join(parts, target, shares, blocks, moment):
    """Return one mixture from those of the groups: mixing is zero across groups, losses are weighted by energy."""
    if len(parts) == 1:
        return parts[0]
    energy = shares * squared_norms(target, moment)
    parameters, losses, taken, diverged = zip(*parts)
    alpha = jax.scipy.linalg.block_diag(*(p[2] for p in parameters))
    joined = jnp.concatenate([p[0] for p in parameters]), jnp.concatenate([p[1] for p in parameters]), alpha
    # A group that stopped early keeps its best loss while the others continue.
    filled = [jnp.where(jnp.isnan(x), jnp.nanmin(x, initial=jnp.inf), x) for x in losses]
    portion = jax.ops.segment_sum(energy, jnp.asarray(blocks), len(parts)) / jnp.sum(energy)
    total = jnp.sum(portion[:, None] * jnp.stack(filled), axis=0)
    steps = jnp.max(jnp.stack(taken))
    total = jnp.where(jnp.arange(total.size) < steps, total, jnp.nan)
    return joined, total, steps, jnp.any(jnp.stack(diverged))
