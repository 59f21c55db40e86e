"""Variable projection: its gradient against differences of an oracle, and what the fit must satisfy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.solvers.basis_learning import learn_basis
from jaxmoe.solvers.mixture import Ragged, owners, reconstruct
from jaxmoe.solvers.variable_projection import reduced_objective, schedule, starts, variable_projection

E, P, Q, M, R = 6, 8, 24, 2, 6


def gaussian(*shape, seed=0, scale=0.02):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def moment_of(size, seed=1):
    inputs = np.random.default_rng(seed).normal(size=(200, size)) * np.geomspace(3, 0.1, size)
    return (inputs.T @ inputs / 200).astype(np.float32)


def wavelet(x):
    return x * (1 - x**2) / (1 + x**2) ** 3


def dense(fit, function=wavelet):
    a, b, alpha = (np.asarray(x, np.float64) for x in (fit.coefficients, fit.bases, fit.mixing))
    return a @ function(np.einsum("em,mrq->erq", alpha, b))


def total_error(fit, weight, root=None):
    root = np.eye(weight.shape[2]) if root is None else root
    return np.linalg.norm((dense(fit) - weight) @ root) / np.linalg.norm(weight @ root)


def reduced_oracle(target, basis, alpha, function, shares, moment):
    """The relative squared error at the best coefficients, by least squares in float64, one expert at a time."""
    lost = whole = 0.0
    for e in range(len(target)):
        root = np.linalg.cholesky(moment[e % len(moment)])
        features, wanted = function(np.tensordot(alpha[e], basis, 1)) @ root, target[e] @ root
        best = np.linalg.lstsq(features.T, wanted.T, rcond=None)[0].T @ features
        lost += shares[e] * np.sum((best - wanted) ** 2)
        whole += shares[e] * np.sum(wanted**2)
    return lost / whole


@pytest.mark.parametrize("rank", [3, 5], ids=["narrow", "full"])
@pytest.mark.parametrize("weighted", ["plain", "pooled", "own"])
def test_gradient_equals_differences_of_the_oracle(rank, weighted):
    rng = np.random.default_rng(0)
    experts, rows, columns, bases = 4, 5, 11, 2
    target = rng.normal(size=(experts, rows, columns))
    basis, alpha = rng.normal(size=(bases, rank, columns)), rng.normal(size=(experts, bases))
    shares = np.array([1.0, 3.0, 0.5, 2.0])
    moment = {
        "plain": np.eye(columns)[None],
        "pooled": moment_of(columns).astype(float)[None],
        "own": np.stack([moment_of(columns, seed).astype(float) for seed in range(experts)]),
    }[weighted]
    oracle = partial(reduced_oracle, target, function=wavelet, shares=shares, moment=moment)
    with jax.enable_x64(True):
        evaluate = reduced_objective(
            jnp.asarray(target),
            activation="wavelet",
            moment=None if weighted == "plain" else jnp.asarray(moment),
            shares=jnp.asarray(shares),
        )
        loss, (d_basis, d_alpha) = jax.jit(evaluate)((jnp.asarray(basis), jnp.asarray(alpha)))
        assert d_basis.dtype == np.float64
        assert float(loss) == pytest.approx(oracle(basis, alpha), rel=1e-3)
        for _ in range(3):
            direction = rng.normal(size=basis.shape), rng.normal(size=alpha.shape)
            ahead, behind = (oracle(basis + h * direction[0], alpha + h * direction[1]) for h in (1e-6, -1e-6))
            slope = float(jnp.sum(d_basis * direction[0]) + jnp.sum(d_alpha * direction[1]))
            assert slope == pytest.approx((ahead - behind) / 2e-6, rel=5e-3, abs=1e-5)


def test_schedule_rises_holds_and_falls():
    factor = np.array([float(schedule(200)(step)) for step in range(200)])
    assert np.all(np.diff(factor[:20]) > 0)
    np.testing.assert_allclose(factor[20:100], 1)
    assert np.all(np.diff(factor[101:]) < 0)
    assert factor[-1] < 0.012


@pytest.fixture(scope="module")
def plain():
    return variable_projection(gaussian(E, P, Q), bases=M, rank=R, steps=400)


def test_it_beats_the_published_algorithm_in_fewer_steps(plain):
    weight = gaussian(E, P, Q)
    published = learn_basis(weight, bases=M, rank=R, steps=2000, patience=None)
    assert total_error(plain, weight) < float(np.sqrt(np.min(published.losses)))


def test_errors_are_those_of_the_factors(plain):
    weight = gaussian(E, P, Q)
    lost = np.linalg.norm(dense(plain) - weight, axis=(1, 2)) / np.linalg.norm(weight, axis=(1, 2))
    np.testing.assert_allclose(plain.error, lost, rtol=1e-3)
    assert total_error(plain, weight) ** 2 == pytest.approx(float(np.min(plain.losses)), rel=1e-2)
    assert plain.losses.shape == (400,)
    assert int(plain.steps) == 400
    assert not bool(plain.diverged)


def test_coefficients_are_a_least_squares_solution(plain):
    features = wavelet(np.einsum("em,mrq->erq", np.asarray(plain.mixing, float), np.asarray(plain.bases, float)))
    residual = dense(plain) - gaussian(E, P, Q)
    # Normal equations: what is left is orthogonal to every feature.
    cosines = residual @ features.swapaxes(1, 2)
    cosines /= np.linalg.norm(residual, axis=2)[:, :, None] * np.linalg.norm(features, axis=2)[:, None, :]
    assert np.max(np.abs(cosines)) < 1e-3


def test_power_of_two_scales_the_result_exactly(plain):
    scaled = variable_projection(gaussian(E, P, Q) * 4, bases=M, rank=R, steps=400)
    np.testing.assert_array_equal(scaled.bases, plain.bases)
    np.testing.assert_array_equal(scaled.mixing, plain.mixing)
    np.testing.assert_array_equal(scaled.coefficients, plain.coefficients * 4)


def test_the_better_start_goes_on():
    weight = gaussian(E, P, Q)
    begun = starts(jnp.asarray(weight) / weight.std(), M, R, jax.random.key(0))
    evaluate = jax.jit(reduced_objective(jnp.asarray(weight) / weight.std(), activation="wavelet"))
    first = [float(evaluate(start)[0]) for start in begun]
    fit = variable_projection(weight, bases=M, rank=R, steps=400, trial=1)
    # One step decides by the loss of the start itself.
    assert float(fit.losses[0]) == pytest.approx(min(first), rel=1e-4)
    assert first[0] != pytest.approx(first[1], rel=1e-2)


def test_no_steps_return_the_start():
    fit = variable_projection(gaussian(E, P, Q), bases=M, rank=R, steps=0)
    np.testing.assert_array_equal(fit.mixing, np.eye(M)[owners(E, M)])
    assert (int(fit.steps), fit.losses.shape) == (0, (0,))


def test_weighted_fits_serve_their_weights(plain):
    weight = gaussian(E, P, Q)
    pooled, rows = moment_of(Q), moment_of(P)
    own = np.stack([np.roll(np.roll(pooled, e, 0), e, 1) for e in range(E)])
    fit = partial(variable_projection, weight, bases=M, rank=R, steps=400)
    root = np.linalg.cholesky(pooled)
    aware = fit(moment=pooled[None])
    assert total_error(aware, weight, root) < 0.8 * total_error(plain, weight, root)
    np.testing.assert_allclose(
        aware.error,
        np.linalg.norm((dense(aware) - weight) @ root, axis=(1, 2)) / np.linalg.norm(weight @ root, axis=(1, 2)),
        rtol=1e-3,
    )
    roots = np.linalg.cholesky(own)
    assert total_error(fit(moment=own), weight, roots) < 0.8 * total_error(plain, weight, roots)
    left = np.linalg.cholesky(rows).T

    def over_rows(found):
        return np.linalg.norm(left @ (dense(found) - weight))

    assert over_rows(fit(row_moment=rows[None])) < 0.9 * over_rows(plain)


def test_expert_weights_trade_errors(plain):
    favour = np.array([20, 1, 1, 1, 1, 1], np.float32)
    bent = variable_projection(gaussian(E, P, Q), bases=M, rank=R, steps=400, expert_weight=favour)
    assert bent.error[0] < 0.9 * plain.error[0]
    assert np.mean(bent.error[1:]) > np.mean(plain.error[1:])


def test_full_capacity_leaves_nothing():
    fit = variable_projection(gaussian(4, 8, 16), bases=4, rank=8, steps=400, learning_rate=0.1)
    assert np.max(fit.error) < 2e-3


def test_more_bases_and_ranks_fit_better(plain):
    weight = gaussian(E, P, Q)
    larger = variable_projection(weight, bases=M + 1, rank=R + 1, steps=400)
    assert total_error(larger, weight) < 0.9 * total_error(plain, weight)


def test_the_nonlinearity_pays(plain):
    error = {"wavelet": total_error(plain, gaussian(E, P, Q))}
    for name, function in {"tanh": np.tanh, "identity": lambda x: x}.items():
        fit = variable_projection(gaussian(E, P, Q), bases=M, rank=R, steps=400, activation=name, learning_rate=0.1)
        error[name] = np.linalg.norm(dense(fit, function) - gaussian(E, P, Q)) / np.linalg.norm(gaussian(E, P, Q))
        assert error[name] == pytest.approx(float(np.sqrt(np.min(fit.losses))), rel=1e-2)
    assert error["wavelet"] < error["tanh"] < error["identity"]


def test_zeros_and_constants():
    fit = partial(variable_projection, bases=M, rank=R, steps=400)
    assert not np.any(dense(fit(np.zeros((E, P, Q)))))
    level = np.full((E, P, Q), 0.1, np.float32)
    assert total_error(fit(level), level) < 2e-3


def test_vmap_equals_a_loop(plain):
    weight = gaussian(E, P, Q)
    many = jax.vmap(partial(variable_projection, bases=M, rank=R, steps=400))(jnp.stack([weight, weight[::-1]]))
    # The first steps only: rounding grows along the path.
    np.testing.assert_allclose(many.losses[0, :10], plain.losses[:10], rtol=2e-3)
    assert np.all(np.min(many.losses, axis=1) < 1.1 * np.min(plain.losses))


def test_broken_numbers_are_flagged():
    weight = gaussian(E, P, Q)
    weight[1, 2, 3] = np.inf
    assert bool(variable_projection(weight, bases=M, rank=R, steps=400).diverged)


@pytest.mark.parametrize(("bases", "rank"), [(7, 2), (2, 9), (0, 2)])
def test_impossible_sizes_are_refused(bases, rank):
    with pytest.raises(JaxmoeError, match="choose 1 to"):
        variable_projection(gaussian(E, P, Q), bases=bases, rank=rank)


@pytest.mark.parametrize("rise", [1.0, 0.0, float("nan")])
def test_a_rise_that_every_step_would_be_is_refused(rise):
    with pytest.raises(JaxmoeError, match="above 1"):
        variable_projection(gaussian(E, P, Q), bases=M, rank=R, rise=rise)


def test_a_loss_below_rounding_does_not_pass_for_zero():
    """Inputs of unequal strength, and a fit that keeps much: an inverse in float32 explains more than there is."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    moment = (axes * np.logspace(0, -6, 32)) @ axes.T
    weight = rng.standard_normal((6, 40, 32)).astype(np.float32)
    fit = variable_projection(
        jnp.asarray(weight), bases=3, rank=24, steps=60, moment=jnp.asarray(moment, jnp.float32)[None]
    )
    assert int(fit.steps) == 60
    approximation = np.asarray(reconstruct(fit.coefficients, fit.bases, fit.mixing, "wavelet"), np.float64)
    gap = weight - approximation
    energies = [np.einsum("eoi,ij,eoj->e", x, moment, x) for x in (gap, weight.astype(np.float64))]
    assert float(fit.losses.min()) == pytest.approx(energies[0].sum() / energies[1].sum(), rel=0.2)


def steep(seed):
    """Experts whose strength lies along few shared directions: long steps are thrown out of their narrow valley."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    rows = rng.normal(size=(8, 32, 16)) * np.arange(1, 17.0) ** -2 @ axes.T
    return np.swapaxes(rows, 1, 2).astype(np.float32)


@pytest.mark.parametrize("seed", [0, 1], ids=["by_trial", "by_returns"])
def test_no_descent_collapses(seed):
    weight = steep(seed)
    fits = {steps: partial(variable_projection, weight, bases=3, rank=13, steps=steps) for steps in (200, 400)}
    before = {steps: fit(rise=np.inf) for steps, fit in fits.items()}
    now = {steps: fit() for steps, fit in fits.items()}
    # Without returns the loss jumps to many times its best.
    losses = np.asarray(before[200].losses)
    assert np.max(losses[30:] / np.minimum.accumulate(losses)[30:]) > 5
    for steps, fit in now.items():
        assert total_error(fit, weight) < 0.9 * total_error(before[steps], weight)
        assert total_error(fit, weight) < 1.01 * float(np.sqrt(np.min(fit.losses)))
        asked, chosen, last = np.asarray(fit.rates)
        assert asked == np.float32(0.3)
        assert last == pytest.approx(chosen / 2 ** int(fit.returns))
        assert last < asked
    assert total_error(now[400], weight) < total_error(now[200], weight)
    assert (now[200].rates[1] < np.float32(0.3)) == (seed == 0)
    assert int(before[200].returns) == 0
    assert before[200].rates[1] == np.float32(0.3)


def test_each_of_a_batch_returns_for_itself():
    weights = np.stack([steep(0), steep(1)])
    fit = partial(variable_projection, bases=3, rank=13, steps=100)
    many = jax.vmap(fit)(weights)
    for number, weight in enumerate(weights):
        alone = fit(weight)
        np.testing.assert_array_equal(many.rates[number, :2], alone.rates[:2])
        own = type(many)(*(x[number] for x in many))
        assert total_error(own, weight) == pytest.approx(total_error(alone, weight), rel=0.05)


def test_ragged_and_weighted_fits_return_too():
    weight = steep(1)
    ragged = Ragged(jnp.array([14, 12, 13]), jnp.array(owners(8, 3)))
    fit = partial(variable_projection, weight, bases=3, rank=14, steps=100, ragged=ragged, moment=moment_of(32)[None])
    before, now = fit(rise=np.inf), fit()
    assert int(now.returns) or now.rates[1] < now.rates[0]
    assert float(np.min(now.losses)) < float(np.min(before.losses))
    for base, rank in enumerate((14, 12, 13)):
        assert not np.any(now.bases[base, rank:])
