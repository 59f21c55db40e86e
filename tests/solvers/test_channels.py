"""Removing channels against numpy in float64."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.slicing import slice_channels
from jaxmoe.solvers.channels import damped, greedy_channels, keep_best, nystrom_down, ridge_leverage

EXPERTS, HIDDEN, CHANNELS, TOKENS = 3, 5, 7, 40


@pytest.fixture(scope="module")
def layer():
    """Return down, the intermediate activations of some tokens and their second moment, in float64."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((EXPERTS, CHANNELS, CHANNELS))
    active = rng.standard_normal((EXPERTS, TOKENS, CHANNELS)) @ mix
    return rng.standard_normal((EXPERTS, HIDDEN, CHANNELS)), active, np.einsum("etc,etd->ecd", active, active)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def test_refitted_down_is_the_least_squares_fit(layer):
    down, active, moment = layer
    kept = np.array([[0, 2, 5], [1, 2, 3], [0, 4, 6]])
    found = np.asarray(nystrom_down(jnp.asarray(down), jnp.asarray(moment), jnp.asarray(kept)))
    for expert, own in enumerate(kept):
        wanted, *_ = np.linalg.lstsq(active[expert][:, own], active[expert] @ down[expert].T, rcond=None)
        np.testing.assert_allclose(found[expert], wanted.T, rtol=1e-8, atol=1e-10)


def error(down, moment, kept):
    inside = moment[:, kept] @ np.linalg.inv(moment[np.ix_(kept, kept)]) @ moment[kept]
    return np.trace(down @ (moment - inside) @ down.T)


def test_greedy_takes_the_best_channel_every_time(layer):
    down, _, moment = layer
    found = np.asarray(greedy_channels(jnp.asarray(down), jnp.asarray(moment), keep=4))
    for expert in range(EXPERTS):
        chosen: list[int] = []
        for _ in range(4):
            rest = [channel for channel in range(CHANNELS) if channel not in chosen]
            chosen.append(min(rest, key=lambda c: error(down[expert], moment[expert], [*chosen, c])))
        assert found[expert].tolist() == sorted(chosen)
        # It need not be the best set, but it is near it.
        best = min(error(down[expert], moment[expert], list(own)) for own in combinations(range(CHANNELS), 4))
        assert error(down[expert], moment[expert], found[expert]) <= 2 * best


def test_greedy_with_twins_and_silence():
    moment = np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = greedy_channels(jnp.ones((1, 2, 4)), jnp.asarray(moment)[None], keep=3)
    assert {0, 2} < set(np.asarray(found)[0].tolist())
    assert len(set(np.asarray(found)[0].tolist())) == 3


def test_leverage_is_that_of_the_formula(layer):
    _, _, moment = layer
    found = np.asarray(ridge_leverage(jnp.asarray(moment), 0.3))
    for own, score in zip(moment, found):
        ridge = 0.3 * np.trace(own) / CHANNELS
        wanted = np.diag(np.linalg.solve(own + ridge * np.eye(CHANNELS), own))
        np.testing.assert_allclose(score, wanted, rtol=1e-9)


def test_damping_makes_anything_invertible():
    moments = jnp.stack([jnp.zeros((3, 3)), jnp.ones((3, 3))])
    assert np.linalg.cond(np.asarray(damped(moments, 0.01))).max() < 1e3


def test_slices_leave_the_order():
    weight = np.arange(24.0).reshape(2, 3, 4)
    kept = np.array([[0, 2], [1, 2]])
    np.testing.assert_array_equal(slice_channels(weight, kept, "up")[1], weight[1, [1, 2]])
    kept = np.array([[0, 3], [1, 2]])
    np.testing.assert_array_equal(slice_channels(weight, kept, "down")[1], weight[1][:, [1, 2]])


def test_keep_best_against_sorting():
    rng = np.random.default_rng(1)
    score = rng.integers(0, 4, (6, 12)).astype(float)
    found = keep_best(score, 6, groups=3)
    for own, kept in zip(score, found):
        for group in range(3):
            part = [i for i in kept if i // 4 == group]
            rest = [i for i in range(4 * group, 4 * group + 4) if i not in part]
            assert len(part) == 2
            assert min(own[part]) >= max(own[rest])


@pytest.mark.parametrize(("keep", "groups"), [(0, 1), (13, 1), (5, 3), (4, 5)])
def test_impossible_numbers_are_refused(keep, groups):
    with pytest.raises(JaxmoeError, match="groups"):
        keep_best(np.zeros(12), keep, groups)
