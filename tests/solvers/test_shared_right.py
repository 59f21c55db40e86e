"""One right factor for all experts against numpy in float64: what it minimises, and what averages cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.solvers.shared_right import shared_right

E, OUT, IN = 4, 6, 9
SIDES = {"wide": (OUT, IN), "tall": (IN, OUT), "stacked is wide": (2, 12)}


def weights(seed=0, sides=(OUT, IN)):
    return np.random.default_rng(seed).normal(size=(E, *sides)).astype(np.float32)


def moments(side, seed=1, spread=1.0):
    """Return a moment for every expert, each with strong directions of its own."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(E, 60, side)) * np.geomspace(1, 0.05**spread, side)
    turn = np.linalg.qr(rng.normal(size=(E, side, side)))[0]
    rows = rows @ turn
    return np.einsum("eti,etj->eij", rows, rows)


def lost(weight, approximation, moment):
    rest = weight - np.asarray(approximation, np.float64)
    return np.einsum("eoi,eij,eoj->e", rest, np.broadcast_to(moment, (E, *moment.shape[-2:])), rest)


def product(fit):
    left, right = (np.asarray(array, np.float64) for array in fit)
    return left @ right


def row_space(weight, factors, pooled_inverse, rank):
    """Return the leading right singular vectors of stacked D_e S_e, brought back by an inverse factor."""
    stacked = np.concatenate([own @ factor for own, factor in zip(weight.astype(np.float64), factors)])
    return np.linalg.svd(stacked)[2][:rank] @ pooled_inverse


def refitted(weight, right, moment):
    """Return each expert's least-squares fit to a given right factor under its own moment."""
    weight = weight.astype(np.float64)
    return np.stack(
        [
            own @ m @ right.T @ np.linalg.inv(right @ m @ right.T) @ right
            for own, m in zip(weight, np.broadcast_to(moment, (E, *moment.shape[-2:])))
        ]
    )


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("rank", [1, 3])
def test_without_moments_it_is_the_svd_of_the_stack(sides, rank):
    weight = weights(sides=sides)
    stacked = weight.reshape(-1, sides[1]).astype(np.float64)
    u, s, v = np.linalg.svd(stacked, full_matrices=False)
    expected = ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(weight.shape)
    np.testing.assert_allclose(product(shared_right(weight, rank=rank)), expected, atol=1e-4)


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("kind", ["one", "each", "diagonals"])
@pytest.mark.parametrize("refit", [True, False])
def test_is_the_published_factor_with_pooled_moments(sides, kind, refit):
    weight, rank = weights(sides=sides), 3
    own = moments(sides[1])
    own = {"one": own[:1], "each": own, "diagonals": np.stack([np.diag(np.diag(m)) for m in own])}[kind]
    pooled = own.mean(0)
    factor = np.linalg.cholesky(pooled)
    right = row_space(weight, [factor] * E, np.linalg.inv(factor), rank)
    expected = refitted(weight, right, own if refit else pooled[None])
    given_ = np.einsum("eii->ei", own) if kind == "diagonals" else own
    fit = shared_right(weight, rank=rank, moment=jnp.asarray(given_), refit=refit)
    assert [array.shape for array in fit] == [(E, sides[0], rank), (rank, sides[1])]
    np.testing.assert_allclose(product(fit), expected, atol=2e-3)
    loss = lost(weight, expected, own)
    np.testing.assert_allclose(lost(weight, product(fit), own), loss, rtol=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99))
def test_no_other_factors_of_a_common_moment_lose_less(seed):
    weight, own = weights(seed), moments(IN, seed + 1)[:1]
    left, right = shared_right(weight, rank=3, moment=jnp.asarray(own))
    best = lost(weight, product((left, right)), own).sum()
    tail = np.linalg.svd(weight.reshape(-1, IN).astype(float) @ np.linalg.cholesky(own[0]), compute_uv=False)[3:]
    assert best == pytest.approx(np.sum(tail**2), rel=1e-3)
    step = np.random.default_rng(seed).normal(size=right.shape)
    moved = refitted(weight, np.asarray(right) + 0.1 * step, own)
    assert lost(weight, moved, own).sum() > best * (1 - 1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99))
def test_a_fit_under_an_experts_own_moment_is_never_worse(seed):
    weight, own = weights(seed), moments(IN, seed + 1)
    pooled, refit = (shared_right(weight, rank=3, moment=jnp.asarray(own), refit=refit) for refit in (False, True))
    np.testing.assert_array_equal(pooled[1], refit[1])
    before, after = (lost(weight, product(fit), own) for fit in (pooled, refit))
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.99 * before.sum()


@pytest.mark.parametrize("seed", range(5))
def test_pooled_moments_lose_less_than_the_mean_of_cholesky_factors(seed):
    """The released code whitens by the mean of the experts' Cholesky factors, and keeps those left factors."""
    weight, own, rank = weights(seed), moments(IN, seed + 1), 3
    factor = np.linalg.cholesky(own).mean(0)
    right = row_space(weight, [factor] * E, np.linalg.inv(factor), rank)
    released = refitted(weight, right, (factor @ factor.T)[None])
    pooled = product(shared_right(weight, rank=rank, moment=jnp.asarray(own), refit=False))
    assert lost(weight, pooled, own).sum() < lost(weight, released, own).sum()


def test_full_rank_loses_nothing_and_more_rank_never_loses_more():
    weight, own = weights(), moments(IN)
    total = lost(weight, 0 * weight, own).sum()
    losses = [
        lost(weight, product(shared_right(weight, rank=rank, moment=jnp.asarray(own), refit=False)), own.mean(0)).sum()
        for rank in (1, 3, 6, IN)
    ]
    assert (np.diff(losses) < 0).all()
    full = product(shared_right(weight, rank=IN, moment=jnp.asarray(own)))
    assert lost(weight, full, own).sum() < 1e-6 * total
    np.testing.assert_allclose(full, weight, atol=1e-2)


@pytest.mark.parametrize("rank", [3, 6, 8, 9])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_singular_moments_are_served_where_there_are_inputs(tokens, rank):
    weight, rows = weights(), np.random.default_rng(2).normal(size=(E, tokens, IN))
    own = np.einsum("eti,etj->eij", rows, rows)
    fit = shared_right(weight, rank=rank, moment=jnp.asarray(own))
    pooled = shared_right(weight, rank=rank, moment=jnp.asarray(own), refit=False)
    assert np.isfinite(product(fit)).all()
    after, before, whole = (lost(weight, x, own) for x in (product(fit), product(pooled), 0 * weight))
    assert (after <= before + 1e-6 * whole).all()
    if tokens <= rank:
        assert (after < 1e-3 * whole).all(), "as many directions as an expert has inputs are enough for these"


def test_experts_of_one_row_space_keep_it():
    rng = np.random.default_rng(3)
    weight = (rng.normal(size=(E, OUT, 2)) @ rng.normal(size=(2, IN))).astype(np.float32)
    fit = shared_right(weight, rank=2, moment=jnp.asarray(moments(IN)))
    np.testing.assert_allclose(product(fit), weight, atol=1e-3)
    nothing = shared_right(0 * weight, rank=2, moment=jnp.asarray(moments(IN)))
    np.testing.assert_array_equal(product(nothing), 0 * weight)


def test_jit_equals_eager():
    weight, own = jnp.asarray(weights()), jnp.asarray(moments(IN), jnp.float32)
    jitted = jax.jit(shared_right, static_argnames=("rank", "refit"))(weight, rank=3, moment=own)
    np.testing.assert_allclose(product(jitted), product(shared_right(weight, rank=3, moment=own)), atol=1e-4)
