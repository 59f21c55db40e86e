"""Basis learning by variable projection: the same mixture of bases, fitted many times faster.

For given bases and mixing the best coefficients are a least-squares solution, so they are eliminated exactly and only
B and alpha are learned:

    H = alpha . B;   F = f(H);   S = F C F^T + eps I;   A = W C F^T S^-1   (Cholesky)
    loss = sum_e tr(W C W^T) - tr(A F C W^T);   dL/dF = 2 A^T (A F - W) C;   dL/dH = dL/dF * f'(H)

With A at its optimum its own gradient vanishes, so what stands above is the exact gradient of the reduced problem (up
to eps). Adam(.9, .99) with a rate that decays linearly to zero, mixing of any sign, start chosen by a short trial of
two, and a last exact solution for A. A second moment C of the inputs weighs the columns; it stands outside f.

Source: MoBE, arXiv 2508.05257, for the form; Golub and Pereyra 1973 for the projection.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxmoe.factors.shared_basis import ACTIVATIONS
from jaxmoe.solvers.mixture import (
    HIGHEST,
    BasisFit,
    activate,
    blend,
    block_svd,
    check_sizes,
    cholesky_with_floor,
    owners,
    pull_back,
    relative_errors,
    right_solve,
    solve_coefficients,
    squared_norms,
    weigh,
    whiten_rows,
)

RIDGE = 1e-5
"""Floor of the Gram matrix of the features during the descent, in units of its mean diagonal."""

SIZE = 0.2
"""Root mean square of the bases' entries at the start: f is gently curved there."""


def variable_projection(
    weight: Float[Array, "expert row column"],
    *,
    bases: int,
    rank: int,
    activation: str = "tanh",
    steps: int = 1_000,
    trial: int = 50,
    learning_rate: float = 0.1,
    patience: int | None = None,
    moment: Array | None = None,
    row_moment: Array | None = None,
    expert_weight: Float[Array, " expert"] | None = None,
    key: Array | None = None,
) -> BasisFit:
    """Fit a mixture of bases with the coefficients eliminated.

    Args:
        weight: the experts' matrices; bases span the columns.
        bases: M, 1 to the number of experts.
        rank: r, 1 to min(row, column).
        activation: f, a name in `ACTIVATIONS`.
        steps: steps of the descent after the trial; 0 returns the better start.
        trial: steps that either start is given before the better is chosen.
        learning_rate: of the first step; decays linearly to zero.
        patience: stop after so many steps without a new best loss; None never stops early.
        moment: second moment of the inputs along the columns, pooled or per expert; None weighs all directions alike.
        row_moment: the same along the rows (for matrices fitted transposed).
        expert_weight: relative weight of every expert's error.
        key: random key of the random start; None is `jax.random.key(0)`.

    Returns:
        The fit, in the weights' own scale.

    Raises:
        JaxmoeError: sizes or names that cannot be fitted.

    Example:
        >>> weight = jax.random.normal(jax.random.key(0), (4, 3, 8))
        >>> fit = variable_projection(weight, bases=2, rank=3, steps=50, trial=10)
        >>> fit.coefficients.shape, bool(fit.losses[-1] < fit.losses[0])
        ((4, 3, 3), True)
    """
    check_sizes(weight.shape, bases, rank, activation)
    weight = jnp.asarray(weight, jnp.float32)
    moment = None if moment is None else jnp.asarray(moment, jnp.float32)
    shares = jnp.ones(weight.shape[0]) if expert_weight is None else jnp.asarray(expert_weight, jnp.float32)
    key = jax.random.key(0) if key is None else key
    (basis, alpha), losses, taken, diverged = _fit(
        whiten_rows(weight, row_moment),
        moment,
        shares,
        key,
        bases=bases,
        rank=rank,
        activation=activation,
        steps=steps,
        trial=trial,
        learning_rate=learning_rate,
        patience=patience,
    )
    coefficients = solve_coefficients(weight, basis, alpha, activation=activation, moment=moment)
    approximation = jnp.matmul(coefficients, ACTIVATIONS[activation](blend(alpha, basis)), precision=HIGHEST)
    error = relative_errors(whiten_rows(weight, row_moment), whiten_rows(approximation, row_moment), moment)
    return BasisFit(coefficients, basis, alpha, jnp.zeros(()), error, losses, taken, diverged)


@partial(jax.jit, static_argnames=("bases", "rank", "activation", "steps", "trial", "patience"))
def _fit(target, moment, shares, key, *, bases, rank, activation, steps, trial, learning_rate, patience):
    """Return the best (B, alpha), losses, steps taken and whether the loss broke."""
    scale = jnp.sqrt(jnp.mean(target**2))
    target = target / jnp.where(scale > 0, scale, 1.0)
    objective = partial(reduced_objective, target, activation=activation, moment=moment, shares=shares)
    descend = partial(_descend, objective)
    starts = _starts(target, bases, rank, key)
    if trial:
        tried = [descend(start, optax.constant_schedule(learning_rate), trial, None) for start in starts]
        second_wins = tried[1][1][trial - 1] < tried[0][1][trial - 1]
        start = jax.tree.map(lambda a, b: jnp.where(second_wins, b, a), tried[0][0], tried[1][0])
    else:
        start = starts[0]
    return descend(start, optax.linear_schedule(learning_rate, 0.0, max(steps, 1)), steps, patience)


def reduced_objective(target, parameters, *, activation, moment=None, shares=None):
    """Return the squared relative error at the best coefficients, and its gradient with respect to (B, alpha)."""
    basis, alpha = parameters
    shares = jnp.ones(target.shape[0], target.dtype) if shares is None else shares
    whole = jnp.sum(shares * squared_norms(target, moment))
    whole = jnp.where(whole > 0, whole, 1.0)
    features, slope = activate(blend(alpha, basis), activation)
    weighed = weigh(features, moment)
    transposed = jnp.swapaxes(weighed, 1, 2)
    factor = cholesky_with_floor(jnp.matmul(features, transposed, precision=HIGHEST), RIDGE)
    product = jnp.matmul(target, transposed, precision=HIGHEST)
    coefficients = right_solve(product, factor)
    energy = jnp.sum(shares * squared_norms(target, moment))
    loss = (energy - jnp.sum(shares * jnp.sum(coefficients * product, axis=(1, 2)))) / whole
    left = jnp.swapaxes(coefficients, 1, 2)
    rows, rank = coefficients.shape[1:]
    weighed_target = weigh(target, moment)
    if rank < rows:
        inner = jnp.matmul(left, coefficients, precision=HIGHEST)
        d_features = jnp.matmul(inner, weighed, precision=HIGHEST) - jnp.matmul(left, weighed_target, precision=HIGHEST)
    else:
        d_features = jnp.matmul(
            left, jnp.matmul(coefficients, weighed, precision=HIGHEST) - weighed_target, precision=HIGHEST
        )
    return loss, pull_back(d_features * slope * (2 * shares / whole)[:, None, None], alpha, basis)


def _descend(objective, start, schedule, steps, patience):
    optimizer = optax.adam(schedule, b2=0.99, eps=1e-12)

    def unfinished(state):
        step, *_, since_best, broken, _ = state
        stale = False if patience is None else since_best >= patience
        return (step < steps) & ~broken & ~jnp.asarray(stale)

    def advance(state):
        step, parameters, moments, best, best_parameters, since_best, _, losses = state
        loss, gradient = objective(parameters)
        better = loss < best
        best_parameters = jax.tree.map(lambda new, old: jnp.where(better, new, old), parameters, best_parameters)
        updates, moments = optimizer.update(gradient, moments)
        return (
            step + 1,
            optax.apply_updates(parameters, updates),
            moments,
            jnp.where(better, loss, best),
            best_parameters,
            jnp.where(better, 0, since_best + 1),
            ~jnp.isfinite(loss),
            losses.at[step].set(loss),
        )

    zero = jnp.zeros((), jnp.int32)
    state = (zero, start, optimizer.init(start), jnp.inf, start, zero, jnp.zeros((), bool), jnp.full(steps, jnp.nan))
    step, _, _, _, parameters, _, broken, losses = jax.lax.while_loop(unfinished, advance, state)
    return parameters, losses, step, broken


def _starts(target, bases, rank, key):
    """Return the start from the blocks' singular vectors and a random one."""
    experts, _, columns = target.shape
    vectors = block_svd(target, bases, rank)[1]
    keys = jax.random.split(key, 2)
    one_hot = jax.nn.one_hot(owners(experts, bases), bases)
    basis = SIZE * jax.random.normal(keys[0], (bases, rank, columns))
    alpha = jax.random.normal(keys[1], (experts, bases)) * bases**-0.5
    return (vectors * (SIZE * columns**0.5), one_hot), (basis, alpha)
