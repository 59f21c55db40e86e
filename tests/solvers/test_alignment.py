"""Alignment against planted permutations and brute force, and what it leaves unchanged."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import unchecked

from jaxmoe.errors import JaxmoeError
from jaxmoe.solvers.alignment import align, barycenter, neuron_matrix

E, F, D = 6, 9, 7


def planted(seed, noise, features=5, channels=F):
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(channels, features))
    orders = np.stack([rng.permutation(channels) for _ in range(E)])
    # Neuron orders[e, i] of expert e is neuron i of the reference.
    neurons = np.stack([reference[np.argsort(order)] for order in orders])
    return neurons + noise * rng.normal(size=neurons.shape), reference, orders


def distance(neurons, order, reference):
    return sum(np.sum((own[perm] - reference) ** 2) for own, perm in zip(neurons, order, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_finds_planted_permutations(seed):
    neurons, reference, orders = planted(seed, noise=0.02, features=12)
    np.testing.assert_array_equal(align(neurons, reference), orders)
    np.testing.assert_array_equal(align(neurons.astype(np.float32), reference.astype(np.float32)), orders)


@pytest.mark.parametrize("seed", range(3))
def test_no_permutation_is_closer(seed):
    rng = np.random.default_rng(seed)
    neurons, reference = rng.normal(size=(3, 5, 4)), rng.normal(size=(5, 4))
    found = align(neurons, reference)
    for own, perm in zip(neurons, found, strict=True):
        best = min(np.sum((own[list(order)] - reference) ** 2) for order in itertools.permutations(range(5)))
        assert np.sum((own[perm] - reference) ** 2) == pytest.approx(best)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.integers(1, 20))
def test_gives_permutations_whatever_the_neurons(seed, channels):
    rng = np.random.default_rng(seed)
    # Few different numbers make ties, and dead neurons.
    neurons = rng.integers(-1, 2, size=(E, channels, 3)).astype(float)
    found = align(neurons, rng.integers(-1, 2, size=(channels, 3)))
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(channels), (E, 1)))


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_barycenter_of_one_expert_in_many_orders_is_that_expert(noise):
    neurons, reference, _ = planted(7, noise, features=12)
    found = barycenter(neurons, iterations=5)
    np.testing.assert_allclose(found, align_to_first(reference, neurons), atol=5 * noise + 1e-12)
    order = align(neurons, found)
    assert distance(neurons, order, found) <= 1.1 * noise**2 * neurons.size + 1e-20


def align_to_first(reference, neurons):
    return reference[align(reference[None], neurons[0])[0]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_each_turn_lowers_the_distance_until_nothing_moves(seed):
    neurons, _, _ = planted(seed, noise=1.0)
    distances = []
    for turns in range(1, 8):
        reference = barycenter(neurons, iterations=turns)
        distances.append(distance(neurons, align(neurons, reference), reference))
    assert np.all(np.diff(distances) <= 1e-9)
    unaligned = distance(neurons, np.tile(np.arange(F), (E, 1)), neurons.mean(0))
    assert distances[0] < unaligned
    settled = barycenter(neurons, iterations=100)
    order = align(neurons, settled)
    np.testing.assert_allclose(np.take_along_axis(neurons, order[:, :, None], 1).mean(0), settled, atol=1e-12)


def test_an_expert_in_another_order_is_the_same_function():
    rng = np.random.default_rng(0)
    gate, up, down = (rng.normal(size=shape) for shape in ((E, F, D), (E, F, D), (E, D, F)))
    inputs = rng.normal(size=(11, D))
    order = align(neuron_matrix(gate, up, down), rng.normal(size=(F, 3 * D)))
    assert not np.array_equal(order, np.tile(np.arange(F), (E, 1)))

    def expert(gate, up, down):
        hidden = inputs @ gate.T
        return (hidden / (1 + np.exp(-hidden)) * (inputs @ up.T)) @ down.T

    for e in range(E):
        moved = expert(gate[e][order[e]], up[e][order[e]], down[e][:, order[e]])
        np.testing.assert_allclose(moved, expert(gate[e], up[e], down[e]), rtol=1e-10, atol=1e-12)


def test_neurons_hold_what_belongs_together_in_equal_measure():
    rng = np.random.default_rng(1)
    gate, up, down = 1e-3 * rng.normal(size=(E, F, D)), rng.normal(size=(E, F, D)), 50 * rng.normal(size=(E, D, F))
    found = neuron_matrix(gate.astype(np.float32), up, down)
    assert found.shape == (E, F, 3 * D)
    parts = np.split(found, 3, axis=2)
    np.testing.assert_allclose([np.mean(part**2) for part in parts], 1, rtol=1e-12)
    row = np.concatenate([gate[2, 4] / 1e-3, up[2, 4], down[2, :, 4] / 50])
    assert np.corrcoef(found[2, 4], row)[0, 1] > 0.99
    np.testing.assert_array_equal(neuron_matrix(0 * gate, up, down)[:, :, :D], 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: align(np.ones((E, F, 3)), np.ones((F, 4))), r"reference \(9, 4\)"),
        (lambda: align(np.full((E, F, 3), np.nan), np.ones((F, 3))), "not finite"),
        (lambda: barycenter(np.ones((E, F, 3)), iterations=0), "0 iterations"),
        (lambda: neuron_matrix(None, np.ones((E, F, D)), np.ones((E, F, D))), r"\(6, 9, 7\), \(6, 7, 9\)"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with unchecked(), pytest.raises(JaxmoeError, match=message):
        call()
