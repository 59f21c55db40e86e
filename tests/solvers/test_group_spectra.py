"""Spectra and bases of groups against numpy's SVD in float64: under moments along either side, with a shorter group."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.solvers.group_spectra import group_bases, group_energies, group_spectra

E, P, Q = 7, 4, 18
WEIGHT = np.random.default_rng(0).normal(size=(E, P, Q)) * np.geomspace(1, 0.1, Q)
SIZES = [1, 3, 7, 9]
"""Groups with fewer stacked rows than columns and with more; in threes the last group has one expert."""


def moments(size, own, seed=1):
    inputs = np.random.default_rng(seed).normal(size=(E if own else 1, 60, size)) * np.geomspace(3, 0.2, size)
    return np.einsum("eti,etj->eij", inputs, inputs) / 60


GIVEN = {
    "plain": {},
    "pooled": {"moment": moments(Q, False)},
    "own": {"moment": moments(Q, True)},
    "rows": {"row_moment": moments(P, True)},
    "both": {"moment": moments(Q, False), "row_moment": moments(P, False)},
}


def stacked(size, moment=None, row_moment=None):
    """Return each group's weighted stack, and the root R of its moment, C = R R'."""
    for start in range(0, E, size):
        members = np.arange(start, min(start + size, E))
        pooled = np.eye(Q) if moment is None else moment[members if len(moment) > 1 else [0]].mean(0)
        rows = []
        for expert in members:
            own = np.eye(P) if row_moment is None else row_moment[expert if len(row_moment) > 1 else 0]
            rows.append(np.linalg.cholesky(own).T @ WEIGHT[expert])
        root = np.linalg.cholesky(pooled)
        yield np.concatenate(rows) @ root, root


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("size", SIZES)
def test_energies_are_squared_singular_values(size, given):
    found = group_energies(jnp.asarray(WEIGHT), size=size, **GIVEN[given])
    assert found.shape == (-(-E // size), min(size * P, Q))
    for own, (matrix, _) in zip(found, stacked(size, **GIVEN[given]), strict=True):
        values = np.linalg.svd(matrix, compute_uv=False) ** 2
        np.testing.assert_allclose(own[: len(values)], values, rtol=1e-3, atol=1e-6 * values[0])
        np.testing.assert_allclose(own[len(values) :], 0, atol=1e-6 * values[0])
    assert (np.diff(found) <= 0).all()


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("size", SIZES)
def test_bases_lose_the_tail_at_every_rank(size, given):
    """Projected on the first rows of a basis, a group loses the energy of all further ones, which is the least."""
    most = min(size * P, Q)
    bases = np.asarray(group_bases(jnp.asarray(WEIGHT), size=size, rank=most, **GIVEN[given]), np.float64)
    for basis, (matrix, root) in zip(bases, stacked(size, **GIVEN[given]), strict=True):
        values = np.linalg.svd(matrix, compute_uv=False) ** 2
        for rank in {1, 2, most // 2 or 1, most}:
            rows = basis[:rank] @ root
            best = matrix - np.linalg.lstsq(rows.T, matrix.T, rcond=1e-9)[0].T @ rows
            tail = values[rank:].sum()
            assert np.sum(best**2) == pytest.approx(tail, rel=2e-3, abs=1e-5 * values.sum())


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("size", SIZES)
def test_one_decomposition_gives_both(size, given):
    both = group_spectra(jnp.asarray(WEIGHT), size=size, **GIVEN[given])
    energies = group_energies(jnp.asarray(WEIGHT), size=size, **GIVEN[given])
    most = energies.shape[1]
    np.testing.assert_allclose(both.energies, energies, rtol=1e-3, atol=1e-5 * float(energies.max()))
    bases = group_bases(jnp.asarray(WEIGHT), size=size, rank=most, **GIVEN[given])
    np.testing.assert_allclose(both.bases, bases, atol=1e-5 * float(abs(bases).max()))


@pytest.mark.parametrize("size", [1, 3])
def test_plain_bases_are_orthonormal_and_the_leading_rows_serve_a_smaller_rank(size):
    bases = group_bases(jnp.asarray(WEIGHT), size=size, rank=3)
    product = np.einsum("gik,gjk->gij", bases, bases)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(3), product.shape), atol=1e-4)
    fewer = group_bases(jnp.asarray(WEIGHT), size=size, rank=2)
    np.testing.assert_allclose(bases[:, :2], fewer, atol=1e-5)


def test_rows_of_one_group_in_any_order_and_any_rotation_carry_the_same_energies():
    rng = np.random.default_rng(4)
    rotation = np.linalg.qr(rng.normal(size=(Q, Q)))[0]
    plain = group_energies(jnp.asarray(WEIGHT), size=E)
    moved = WEIGHT[rng.permutation(E)][:, rng.permutation(P)] @ rotation
    np.testing.assert_allclose(group_energies(jnp.asarray(moved), size=E), plain, rtol=1e-3, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.25, 1.0, 64.0]))
def test_energies_sum_to_the_squares_in_any_unit(seed, unit):
    weight = np.random.default_rng(seed).normal(size=(E, P, Q)) * unit
    found = group_energies(jnp.asarray(weight), size=3)
    sums = [np.sum(weight[start : start + 3] ** 2) for start in (0, 3, 6)]
    np.testing.assert_allclose(np.asarray(found, np.float64).sum(1), sums, rtol=1e-4)


@pytest.mark.parametrize("given", ["plain", "own", "rows"])
def test_groups_of_zeros_are_finite(given):
    weight = WEIGHT.copy()
    weight[:3] = 0
    found = group_energies(jnp.asarray(weight), size=3, **GIVEN[given])
    assert not np.any(found[0])
    assert np.isfinite(group_bases(jnp.asarray(weight), size=3, rank=4, **GIVEN[given])).all()


def test_a_singular_moment_gives_finite_bases_that_lose_nothing_it_sees():
    inputs = np.random.default_rng(6).normal(size=(40, Q)) * (np.arange(Q) < 5)
    moment = (inputs.T @ inputs / 40)[None]
    bases = np.asarray(group_bases(jnp.asarray(WEIGHT), size=E, rank=5, moment=moment), np.float64)
    assert np.isfinite(bases).all()
    matrix, rows = WEIGHT.reshape(-1, Q) @ inputs.T, bases[0] @ inputs.T
    left = matrix - np.linalg.lstsq(rows.T, matrix.T, rcond=1e-9)[0].T @ rows
    assert np.sum(left**2) < 1e-4 * np.sum(matrix**2)


def test_jit_equals_eager_and_half_precision_is_widened():
    half = jnp.asarray(WEIGHT, jnp.bfloat16)
    for function in (partial(group_energies, size=3), partial(group_bases, size=3, rank=2)):
        found = function(half)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(jax.jit(function)(half), found, atol=1e-4)
        np.testing.assert_allclose(function(half.astype(jnp.float32)), found, atol=1e-6)
