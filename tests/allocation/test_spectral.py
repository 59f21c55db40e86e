"""Water filling against brute force, and what it promises for any spectra, costs and bounds."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.allocation import water_fill
from jaxmoe.errors import JaxmoeError

# Few different values make ties.
spectra = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 7.0]), max_size=5).map(lambda x: sorted(x, reverse=True)),
    min_size=1,
    max_size=4,
)


@st.composite
def problems(draw, equal=False):
    energies = draw(spectra)
    units = len(energies)
    cost = draw(st.integers(1, 9))
    costs = [cost if equal else draw(st.integers(1, 9)) for _ in range(units)]
    caps = [draw(st.integers(0, 6)) for _ in range(units)]
    limit = [min(cap, len(row)) for cap, row in zip(caps, energies, strict=True)]
    minimum = [draw(st.integers(0, each)) for each in limit]
    least, most = (int(np.dot(costs, each)) for each in (minimum, limit))
    return energies, costs, draw(st.integers(least, most + 5)), minimum, caps, limit


def kept(energies, ranks):
    return sum(sum(row[:rank]) for row, rank in zip(energies, ranks, strict=True))


def best(energies, costs, budget, minimum, limit):
    ranges = [range(low, high + 1) for low, high in zip(minimum, limit, strict=True)]
    return max(kept(energies, r) for r in itertools.product(*ranges) if np.dot(costs, r) <= budget)


@settings(max_examples=300, deadline=None)
@given(problems(equal=True))
def test_no_ranks_of_equal_cost_keep_more(problem):
    energies, costs, budget, minimum, caps, limit = problem
    ranks, _ = water_fill(energies, costs, budget, minimum=minimum, caps=caps)
    assert kept(energies, ranks) == pytest.approx(best(energies, costs, budget, minimum, limit), abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_no_ranks_keep_more_than_a_last_step_at_the_threshold_would_add(problem):
    energies, costs, budget, minimum, caps, limit = problem
    ranks, threshold = water_fill(energies, costs, budget, minimum=minimum, caps=caps)
    most = best(energies, costs, budget, minimum, limit)
    assert kept(energies, ranks) >= most - threshold * max(costs) - 1e-12
    if threshold == 0:
        assert kept(energies, ranks) == pytest.approx(most, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_budget_is_spent_within_bounds_and_above_the_threshold_all_is_kept(problem):
    energies, costs, budget, minimum, caps, limit = problem
    ranks, threshold = water_fill(energies, costs, budget, minimum=minimum, caps=caps)
    assert np.all(ranks >= minimum)
    assert np.all(ranks <= limit)
    left = budget - np.dot(costs, ranks)
    assert left >= 0
    assert all(cost > left for cost, rank, high in zip(costs, ranks, limit, strict=True) if rank < high)
    for row, cost, rank, high in zip(energies, costs, ranks, limit, strict=True):
        assert all(energy / cost <= threshold for energy in row[rank:high])


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 20))
def test_a_larger_budget_never_keeps_less(problem, more):
    energies, costs, budget, minimum, caps, _ = problem
    ranks, threshold = water_fill(energies, costs, budget, minimum=minimum, caps=caps)
    richer, lower = water_fill(energies, costs, budget + more, minimum=minimum, caps=caps)
    assert kept(energies, richer) >= kept(energies, ranks) - 1e-12
    assert lower <= threshold
    if len(set(costs)) == 1:
        assert np.all(richer >= ranks)


def test_ragged_lists_equal_padded_arrays():
    rng = np.random.default_rng(0)
    padded = -np.sort(-rng.pareto(1.0, size=(6, 9)), axis=1)
    lengths = [9, 3, 7, 1, 9, 5]
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = 0
    ragged = [row[:length] for row, length in zip(padded, lengths, strict=True)]
    by_list, first = water_fill(ragged, 7, 120)
    by_array, second = water_fill(padded, 7, 120, caps=lengths)
    np.testing.assert_array_equal(by_list, by_array)
    assert first == second


def test_equal_gains_go_to_the_first_unit():
    ranks, threshold = water_fill(np.ones((3, 4)), 5, 5 * 6)
    assert ranks.tolist() == [4, 2, 0]
    assert threshold == 0.2


def test_ranks_that_keep_nothing_are_spent_too():
    assert water_fill([[1.0, 0.0, 0.0], [0.0, 0.0]], 3, 12)[0].tolist() == [3, 1]


def test_what_a_dear_unit_leaves_goes_to_cheap_ones():
    ranks, threshold = water_fill([[100.0, 90.0], [1.0, 0.5, 0.1]], [50, 1], 99)
    assert ranks.tolist() == [1, 3]
    assert threshold == 90 / 50
    ranks, _ = water_fill([[100.0, 90.0], [1.0, 0.5, 0.1]], [50, 1], 52)
    assert ranks.tolist() == [1, 2]


def test_a_million_energies_take_seconds():
    rng = np.random.default_rng(0)
    energies = -np.sort(-rng.pareto(1.0, size=(2000, 512)), axis=1)
    costs = rng.integers(100, 3000, size=2000)
    started = time.perf_counter()
    ranks, threshold = water_fill(energies, costs, int(costs.sum()) * 100, minimum=1)
    assert time.perf_counter() - started < 20
    left = int(costs.sum()) * 100 - int(ranks @ costs)
    assert 0 <= left < costs[ranks < 512].min()
    np.testing.assert_array_equal(np.maximum(1, (energies / costs[:, None] > threshold).sum(1)) <= ranks, True)


def test_no_units():
    ranks, threshold = water_fill([], 1, 0)
    assert ranks.tolist() == []
    assert threshold == 0.0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1.0, 2.0], [1.0, 1.0]], 1, 3), {}, r"energies of units \[0\]: .* descending"),
        (([[2.0, 1.0], [1.0, np.nan]], 1, 3), {}, r"energies of units \[1\]"),
        (([[2.0, -1.0]], 1, 3), {}, r"energies of units \[0\]"),
        (([[[2.0]]], 1, 3), {}, r"energies of units \[0\] are not lists"),
        (([[2.0], [1.0]], [4, 5], 8), {"minimum": 1}, "a budget of 8 numbers is out of reach: the least is 9"),
        (([[2.0], [1.0]], 1, 8), {"minimum": [1, 2]}, "minimum: 2 of unit 1"),
        (([[2.0], [1.0]], 0, 8), {}, "costs: 0 of unit 0, 0 of unit 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, options, message):
    with pytest.raises(JaxmoeError, match=message):
        water_fill(*arguments, **options)
