"""Salience, shares of the error and shifts in pairs: known values, exhaustive search, and what the sums must be."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.solvers.bit_shifts import group_errors, paired_shifts, ranked_shifts, salience, two_levels
from jaxmoe.solvers.error_feedback import error_feedback, factored


def moments(experts, side, seed=0):
    inputs = np.random.default_rng(seed).normal(size=(experts, 3 * side, side)) * np.geomspace(2, 0.2, side)
    return np.einsum("eti,etj->eij", inputs, inputs) / (3 * side)


def test_salience_is_the_published_one():
    rng = np.random.default_rng(1)
    weight, moment = rng.normal(size=(3, 5, 12)), moments(3, 12)
    damped = moment + 0.01 * np.trace(moment, axis1=1, axis2=2)[:, None, None] / 12 * np.eye(12)
    upper = np.array([np.linalg.cholesky(np.linalg.inv(own)).T for own in damped])
    ratios = weight**2 / np.diagonal(upper, axis1=1, axis2=2)[:, None] ** 2
    expected = ratios.reshape(3, 5, 4, 3).mean((1, 3))
    np.testing.assert_allclose(salience(weight, moment, group=3), expected, rtol=1e-4)


@pytest.mark.parametrize("order", [pytest.param(False, marks=pytest.mark.slow), True])
def test_errors_of_groups_add_up_to_the_objective(order):
    rng = np.random.default_rng(2)
    weight, moment = rng.normal(size=(3, 8, 16)).astype(np.float32), moments(3, 16).astype(np.float32)
    store = Store(bits=2, group=4)
    rest = weight - np.asarray(error_feedback(weight, store, moment=moment, order=order).values(store))
    errors = np.asarray(group_errors(rest, factored(moment, order=order), group=4))
    damped = moment + 0.01 * np.trace(moment, axis1=1, axis2=2)[:, None, None] / 16 * np.eye(16)
    np.testing.assert_allclose(errors.sum(1), np.einsum("eoi,eij,eoj->e", rest, damped, rest), rtol=1e-4)
    assert errors.shape == (3, 4)
    # Of the identity it is the plain squared error of each group.
    identity = factored(np.eye(16)[None], damping=0)
    squares = (rest**2).reshape(3, 8, 4, 4).sum((1, 3))
    np.testing.assert_allclose(group_errors(rest, identity, group=4), squares, rtol=1e-4)


@pytest.mark.parametrize(
    ("gain", "loss", "shifts"),
    [
        ([6, 1, 3, 2], [9, 0.5, 4, 1.5], [1, -1, 1, -1]),
        ([1, 2, 3], [4, 5, 6], [0, 0, 0]),
        ([5], [1], [0]),
        ([], [], []),
        ([9, 1], [0, 2], [1, -1]),
    ],
)
def test_known_pairs(gain, loss, shifts):
    assert paired_shifts(np.array(gain, float), np.array(loss, float)).tolist() == shifts


def test_pairs_are_the_best_of_all_shifts():
    rng = np.random.default_rng(3)
    for groups in rng.integers(2, 7, 400).tolist():
        gain = rng.exponential(size=groups).round(1)
        loss = gain + rng.exponential(size=groups).round(1)
        best = max(
            np.sum(gain * (own == 1)) - np.sum(loss * (own == -1))
            for own in map(np.array, itertools.product((-1, 0, 1), repeat=groups))
            if own.sum() == 0
        )
        found = paired_shifts(gain, loss)
        assert found.sum() == 0
        assert np.sum(gain * (found == 1)) - np.sum(loss * (found == -1)) == pytest.approx(best)


def test_ranked_shifts():
    assert ranked_shifts(np.array([5.0, 1, 9, 2]), 2).tolist() == [1, -1, 1, -1]
    assert ranked_shifts(np.array([5.0, 1, 9]), 0).tolist() == [0, 0, 0]
    with pytest.raises(JaxmoeError, match="2 pairs of 3"):
        ranked_shifts(np.ones(3), 2)
    with pytest.raises(JaxmoeError, match="finite"):
        paired_shifts(np.array([np.nan]), np.array([1.0]))


def test_two_levels():
    store = Store(bits=1, zero="real", group=4)
    x = np.array([[1.0, 2, 3, -2], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0], [-1, 1, -1, 1]])
    scale, zero = (found[0, :, 0] for found in two_levels(x[None, :, None], store))
    for array in (scale, zero):
        np.testing.assert_array_equal(array, array.astype(jnp.bfloat16).astype(jnp.float32))
    levels = np.stack([np.asarray(scale * (code - zero)) for code in (0, 1)], axis=1)
    np.testing.assert_allclose(levels[0], [-0.5, 2.5], atol=0.01)
    nearest = np.abs(x[:, :, None] - levels[:, None]).min(2)
    assert (nearest[0] ** 2).sum() == pytest.approx(5, rel=0.02)
    np.testing.assert_array_equal(nearest[1:], 0)
    values = Rounded(np.array([[[0, 1, 1, 0]]], np.uint8), scale[None, :1, None], zero[None, :1, None]).values(store)
    np.testing.assert_allclose(values, [[levels[0, [0, 1, 1, 0]]]])
