"""Basis learning by variable projection: the same mixture of bases, fitted tens of times faster than as published.

For given bases and mixing the best coefficients are a least-squares solution, so they are eliminated exactly and only
B and alpha are learned:

    H = alpha . B;   F = f(H);   S = F C Fᵀ + eps I;   A = W C Fᵀ S⁻¹   (Cholesky)
    loss = sum_e tr(W C Wᵀ) - tr(A F C Wᵀ);   dL/dF = 2 Aᵀ (A F - W) C;   dL/dH = dL/dF * f'(H)

With A at its optimum its own gradient vanishes, so what stands above is the exact gradient of the reduced problem (up
to eps). Mixing may have any sign. Adam takes long steps at a constant rate after a short warm-up, then the rate decays
to zero over the second half: the long steps find the valley, the decay its floor. The start is chosen by running both
the blocks' singular vectors and a random one for the first few steps; the better one continues. A last exact solution
for A closes.

A second moment C of the inputs weighs the columns; it stands outside f. One step costs about 2 E r Q (3 P + 3 M + r)
operations, 2 E r Q² more with a moment. Source: MoBE, arXiv 2508.05257, for the form; Golub and Pereyra 1973 for the
projection. Steps, rate and activation were chosen on one layer of one small checkpoint.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.solvers.descent import SHRINK, Descent, begin, descend, either
from jaxmoe.solvers.mixture import (
    HIGHEST,
    BasisFit,
    Ragged,
    activate,
    blend,
    block_svd,
    check_sizes,
    cholesky_with_floor,
    lower_inverse,
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

RIDGE = 1e-5
"""Floor of the features' Gram matrix during the descent, in units of its mean diagonal."""

SIZE = 0.2
"""Root mean square of the bases' entries at the start: every f is gently curved there."""

BOUNDED = ("tanh", "sigmoid", "wavelet")
"""The functions through which most targets bear long steps."""

LOWER = (0.3, 0.1)
"""Factors on the rate that are tried, one after the other, as long as the loss rises in the better trial so far."""

RISE = 1.5
"""Factor on the best loss above which a descent returns; where long steps do good the loss stays closer to it."""

GOAL = 1e-7
"""Squared relative error at which nothing is left to gain: float32 and bfloat16 storage see no difference."""

ROUNDING = 1e-6
"""Squared relative error below which a rise may be rounding: sums and inverses are in float32."""


def variable_projection(
    weight: Float[AnyArray, "expert row column"],
    *,
    bases: int,
    rank: int,
    activation: str = "wavelet",
    steps: int = 1_000,
    trial: int = 40,
    learning_rate: float | None = None,
    rise: float = RISE,
    patience: int | None = None,
    moment: Float[AnyArray, "_ column column"] | None = None,
    row_moment: Float[AnyArray, "_ row row"] | None = None,
    expert_weight: Float[AnyArray, " expert"] | None = None,
    ragged: Ragged | None = None,
    key: Array | None = None,
) -> BasisFit:
    """Fit a mixture of bases with the coefficients eliminated.

    Args:
        weight: the experts' matrices; bases span the columns.
        bases: M, 1 to the number of experts.
        rank: r, 1 to min(row, column).
        activation: f, a name in `ACTIVATIONS`.
        steps: length of the schedule; 0 returns the first start.
        trial: steps of it that both starts, and lower rates where they are called for, are given before the best goes
            on.
        learning_rate: of the long steps, the highest that is tried; None is 0.3 for bounded functions and 0.1 for the
            others.
        rise: factor on the best loss, above 1, beyond which the descent returns to the best state with half the rate;
            with infinity it returns from losses alone that are not finite.
        patience: stop after so many steps without a new best loss; None runs the whole schedule, whose end gains most.
        moment: second moment of the inputs along the columns, `[1|expert, column, column]`; None for an
            unweighted error.
        row_moment: the same along the rows, `[1|expert, row, row]` (for matrices fitted transposed).
        expert_weight: relative weight of every expert's error.
        ragged: unequal ranks of the bases, the largest of them `rank`; None for equal ones.
        key: random key of the random start; None is `jax.random.key(0)`.

    Returns:
        The fit, in the weights' own scale.

    Raises:
        JaxmoeError: sizes or names that cannot be fitted, or a rise that every step would be.

    Example:
        >>> weight = jax.random.normal(jax.random.key(0), (4, 3, 8))
        >>> fit = variable_projection(weight, bases=2, rank=3, steps=100)
        >>> fit.coefficients.shape, bool(fit.losses[-1] < fit.losses[0])
        ((4, 3, 3), True)
    """
    check_sizes(weight.shape, bases, rank, activation, ragged)
    check_moment("moment", moment, weight.shape[0], weight.shape[2])
    check_moment("row_moment", row_moment, weight.shape[0], weight.shape[1])
    if not rise > 1:
        raise JaxmoeError(f"rise={rise}: give a factor above 1 on the best loss, 1.5 is the default")
    rate = learning_rate or (0.3 if activation in BOUNDED else 0.1)
    as_float = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    return _project(
        *as_float((weight, moment, row_moment, expert_weight, rate, rise)),
        jax.random.key(0) if key is None else key,
        trial,
        ragged,
        bases=bases,
        rank=rank,
        activation=activation,
        steps=steps,
        patience=patience,
    )


@partial(jax.jit, static_argnames=("bases", "rank", "activation", "steps", "patience"))
def _project(
    weight, moment, row_moment, shares, rate, rise, key, trial, ragged, *, bases, rank, activation, steps, patience
) -> BasisFit:
    """Fit at unit scale, then solve for the coefficients at the weights' own."""
    target = whiten_rows(weight, row_moment)
    size = jnp.sqrt(jnp.mean(target**2))
    target = target / jnp.where(size > 0, size, 1.0)
    evaluate = reduced_objective(target, activation=activation, moment=moment, shares=shares, ragged=ragged)
    end = _compete(evaluate, starts(target, bases, rank, key, ragged), rate, rise, trial, steps, patience)
    basis, alpha = end.best
    coefficients = solve_coefficients(weight, basis, alpha, activation=activation, moment=moment, ragged=ragged)
    approximation = reconstruct(coefficients, basis, alpha, activation)
    error = relative_errors(whiten_rows(weight, row_moment), whiten_rows(approximation, row_moment), moment)
    return BasisFit(
        coefficients,
        basis,
        alpha,
        jnp.zeros(()),
        error,
        end.losses,
        end.steps,
        jnp.stack([rate, end.rate / SHRINK**end.returns, end.rate]),
        end.returns,
        end.diverged,
    )


def _compete(evaluate, candidates, rate, rise, trial, steps, patience) -> Descent:
    """Return the whole descent of the start, and then of the rate, that are best after `trial` steps."""
    direction = optax.scale_by_adam(b1=0.85, b2=0.95, eps=1e-12)
    both = jax.tree.map(lambda *x: jnp.stack(x), *candidates)
    rates = rate * jnp.array([1.0, *LOWER])
    last = len(LOWER) + 2

    def phase(number, state):
        # Two starts, the lower rates, then the best to the end: one loop serves all, so that it is compiled once.
        leader, place = state
        own = jnp.where(number < 2, number, place)
        begun = begin(
            jax.tree.map(lambda x: x[own], both), direction, rate=rates[jnp.maximum(number - 1, 0)], steps=steps
        )
        now = either(number == last, leader, begun)
        wanted = (number < 2) | (leader.returns > 0)
        until = jnp.where(number == last, steps, jnp.where(wanted, trial, 0))
        now = descend(
            evaluate,
            now,
            direction,
            schedule=schedule(steps),
            until=until,
            patience=patience,
            goal=GOAL,
            rise=rise,
            rounding=ROUNDING,
        )
        leads = (number == 0) | (number == last) | (now.best_loss < leader.best_loss)
        return either(leads, (now, own), state)

    first = begin(candidates[0], direction, rate=rate, steps=steps)
    return lax.fori_loop(0, last + 1, phase, (first, jnp.zeros((), jnp.int32)))[0]


def schedule(steps: int):
    """Return the factor on the rate at each step: up over 20 steps, constant, linearly to zero over the second half.

    Example:
        >>> [round(float(schedule(100)(step)), 2) for step in (0, 20, 50, 75, 99)]
        [0.05, 1.0, 1.0, 0.5, 0.02]
    """

    def factor(step):
        return jnp.minimum(jnp.minimum(1.0, (step + 1) / 20), 2 * (1 - step / max(steps, 1)))

    return factor


def starts(
    target: Float[AnyArray, "expert row column"], bases: int, rank: int, key: Array, ragged: Ragged | None = None
):
    """Return two starts (bases, mixing): singular vectors of consecutive blocks of experts, and random numbers."""
    experts, _, columns = target.shape
    vectors = block_svd(target, bases, rank, ragged)[1]
    owner = owners(experts, bases) if ragged is None else ragged.owner
    # One draw for both: random numbers are most of what there is to compile here.
    noise = jax.random.normal(key, (bases * (rank * columns + experts),))
    basis = SIZE * noise[: bases * rank * columns].reshape(bases, rank, columns)
    if ragged is not None:
        basis = basis * ragged.of_bases(rank)
    alpha = noise[bases * rank * columns :].reshape(experts, bases) * bases**-0.5
    return (vectors * (SIZE * columns**0.5), jax.nn.one_hot(owner, bases)), (basis, alpha)


def reduced_objective(
    target: Float[AnyArray, "expert row column"],
    *,
    activation: str,
    moment=None,
    shares=None,
    ragged: Ragged | None = None,
):
    """Return a function of (bases, mixing): the relative squared error at the best coefficients, and its gradient."""
    shares = jnp.ones(target.shape[0], target.dtype) if shares is None else shares
    weighed_target = weigh(target, moment)
    energy = jnp.sum(shares * squared_norms(target, moment))
    whole = jnp.where(energy > 0, energy, 1.0)

    def evaluate(parameters):
        basis, alpha = parameters
        features, slope = activate(blend(alpha, basis), activation)
        if ragged is not None:
            used = ragged.of_experts(basis.shape[1])
            features, slope = features * used, slope * used
        weighed = weigh(features, moment)
        transposed = jnp.swapaxes(weighed, 1, 2)
        gram = jnp.matmul(features, transposed, precision=HIGHEST)
        # Products with the explicit inverse are faster than two triangular solves, and a gradient needs no more digits.
        half = lower_inverse(cholesky_with_floor(gram, RIDGE))
        inverse = jnp.matmul(jnp.swapaxes(half, 1, 2), half, precision=HIGHEST)
        product = jnp.matmul(target, transposed, precision=HIGHEST)
        coefficients = jnp.matmul(product, inverse, precision=HIGHEST)
        left = jnp.swapaxes(coefficients, 1, 2)
        inner = jnp.matmul(left, coefficients, precision=HIGHEST)
        # What these coefficients explain, not what the best would: an inverse in float32 is off by more than the loss
        # of a fit that keeps much, and a loss of zero that is none would end the descent.
        explained = 2 * jnp.sum(coefficients * product, axis=(1, 2)) - jnp.sum(inner * gram, axis=(1, 2))
        rows, rank = coefficients.shape[1:]
        if rank < rows:
            # Neither A F nor the residual is formed: r is the short side.
            d_features = jnp.matmul(inner, weighed, precision=HIGHEST)
            d_features = d_features - jnp.matmul(left, weighed_target, precision=HIGHEST)
        else:
            residual = jnp.matmul(coefficients, weighed, precision=HIGHEST) - weighed_target
            d_features = jnp.matmul(left, residual, precision=HIGHEST)
        d_blend = d_features * slope * (2 * shares / whole)[:, None, None]
        d_basis, d_alpha = pull_back(d_blend, alpha, basis)
        if ragged is not None:
            d_basis = d_basis * ragged.of_bases(basis.shape[1])
        return jnp.maximum(energy - jnp.sum(shares * explained), 0.0) / whole, (d_basis, d_alpha)

    return evaluate
