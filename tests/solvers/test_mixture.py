"""What both solvers share: exact coefficients, errors, starts."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.solvers.mixture import (
    blend,
    block_svd,
    location_and_scale,
    lower_inverse,
    owners,
    relative_errors,
    solve_coefficients,
    whiten_rows,
)

E, P, Q, M, R = 5, 6, 14, 2, 4
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(E, P, Q))
BASES = RNG.normal(size=(M, R, Q))
MIXING = RNG.normal(size=(E, M))


def moments(kind):
    if kind is None:
        return None
    inputs = RNG.normal(size=(E if kind == "own" else 1, 40, Q)) * np.geomspace(5, 0.05, Q)
    return np.einsum("...ti,...tj->...ij", inputs, inputs) / 40


@pytest.mark.parametrize("kind", [None, "pooled", "own"])
def test_coefficients_equal_least_squares(kind):
    moment = moments(kind)
    found = solve_coefficients(WEIGHT, BASES, MIXING, activation="tanh", moment=moment)
    for e in range(E):
        root = np.eye(Q) if kind is None else np.linalg.cholesky(moment[0 if kind == "pooled" else e])
        features = np.tanh(np.tensordot(MIXING[e], BASES, 1)) @ root
        best = np.linalg.lstsq(features.T, (WEIGHT[e] @ root).T, rcond=None)[0].T
        np.testing.assert_allclose(found[e], best, rtol=2e-3, atol=2e-3)


def test_coefficients_absorb_the_rounding_of_bases():
    coefficients = RNG.normal(size=(E, P, R))
    weight = coefficients @ np.tanh(np.einsum("em,mrq->erq", MIXING, BASES))
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (BASES, MIXING)]

    def error(a):
        features = np.tanh(np.einsum("em,mrq->erq", *(np.asarray(x, np.float64) for x in (rounded[1], rounded[0]))))
        return np.linalg.norm(np.asarray(a, np.float64) @ features - weight)

    assert error(solve_coefficients(weight, *rounded, activation="tanh")) < 0.95 * error(coefficients)


def test_coefficients_stay_finite_on_singular_features():
    twin = np.repeat(BASES[:, :1], R, axis=1)
    found = solve_coefficients(WEIGHT, twin, MIXING, activation="tanh")
    feature = np.tanh(np.einsum("em,mrq->erq", MIXING, twin))
    best = np.stack([np.linalg.lstsq(f.T, w.T, rcond=None)[0].T @ f for f, w in zip(feature, WEIGHT)])
    np.testing.assert_allclose(found @ feature, best, atol=1e-3)
    assert not np.any(solve_coefficients(WEIGHT, 0 * BASES, MIXING, activation="tanh"))


def test_a_moment_along_the_rows_becomes_an_ordinary_problem():
    moment = np.cov(RNG.normal(size=(P, 30)))
    whitened = whiten_rows(jnp.asarray(WEIGHT), jnp.asarray(moment)[None])
    expected = [np.trace(w.T @ moment @ w) for w in WEIGHT]
    np.testing.assert_allclose(jnp.sum(whitened**2, axis=(1, 2)), expected, rtol=1e-4)


def test_block_svd_is_the_best_of_each_block():
    coefficients, bases = block_svd(jnp.asarray(WEIGHT, jnp.float32), M, R)
    for e, block in enumerate(owners(E, M)):
        stacked = WEIGHT[owners(E, M) == block].reshape(-1, Q)
        vt = np.linalg.svd(stacked)[2][:R]
        np.testing.assert_allclose(coefficients[e] @ bases[block], WEIGHT[e] @ vt.T @ vt, atol=1e-4)
        np.testing.assert_allclose(bases[block].max(axis=1), np.abs(bases[block]).max(axis=1))


def test_location_and_scale_of_a_constant_are_exact():
    mean, scale = location_and_scale(jnp.full((7, 11, 13), 0.1))
    assert (float(mean), float(scale)) == (float(np.float32(0.1)), 0.0)
    mean, scale = location_and_scale(jnp.asarray(WEIGHT, jnp.float32) + 100)
    assert (float(mean), float(scale)) == pytest.approx((WEIGHT.mean() + 100, WEIGHT.std()), rel=1e-5)


def test_errors_of_vanished_weights():
    zero = jnp.zeros((1, 2, 3))
    assert float(relative_errors(zero, zero)[0]) == 0
    assert np.isinf(relative_errors(zero, zero + 1)[0])


def test_blend():
    np.testing.assert_allclose(
        blend(jnp.asarray(MIXING), jnp.asarray(BASES)), np.einsum("em,mrq->erq", MIXING, BASES), atol=1e-5
    )


@pytest.mark.parametrize("rank", [1, 2, 16, 17, 40, 100])
def test_lower_inverse_equals_float64(rank):
    rng = np.random.default_rng(rank)
    square = rng.standard_normal((3, rank, 2 * rank))
    factor = np.linalg.cholesky(square @ square.swapaxes(1, 2))
    found = np.asarray(lower_inverse(jnp.asarray(factor, jnp.float32)))
    np.testing.assert_allclose(found, np.linalg.inv(factor), atol=2e-5 * np.abs(np.linalg.inv(factor)).max())
    assert not np.triu(found, 1).any()
