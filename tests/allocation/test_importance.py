"""Ranks by importance: against the published rule spelled out in fractions, and the promise to spend the budget."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxmoe.allocation import floor_ranks, ranks_by_importance
from jaxmoe.errors import JaxmoeError


@st.composite
def problems(draw, unimportant=True):
    units = draw(st.integers(1, 8))
    smallest = 0 if unimportant else 1
    importance = draw(st.lists(st.integers(smallest, 1000), min_size=units, max_size=units))
    costs = draw(st.lists(st.integers(1, 300), min_size=units, max_size=units))
    minimum = draw(st.lists(st.integers(0, 3), min_size=units, max_size=units))
    caps = [low + draw(st.integers(0, 60)) for low in minimum]
    least = sum(np.multiply(costs, minimum))
    most = sum(np.multiply(costs, caps))
    budget = int(draw(st.integers(int(least), int(most) + 50)))
    return importance, costs, caps, budget, minimum


@settings(max_examples=400, deadline=None)
@given(problems())
def test_the_budget_is_spent_within_bounds(problem):
    importance, costs, caps, budget, minimum = problem
    ranks = ranks_by_importance(importance, costs, caps, budget, minimum=minimum)
    assert ranks.dtype == np.int64
    assert np.all(ranks >= minimum)
    assert np.all(ranks <= caps)
    left = budget - ranks @ np.array(costs)
    assert left >= 0
    below = np.array(costs)[ranks < caps]
    assert not len(below) or left < below.min()


def exact(importance, costs, caps, budget, minimum):
    """The rule in fractions: lambda from the breakpoints of a piecewise linear sum, then the largest remainders."""

    def ideal(level):
        return [
            min(max(level * c, Fraction(low)), Fraction(cap))
            for c, low, cap in zip(importance, minimum, caps, strict=True)
        ]

    def total(level):
        return sum(cost * x for cost, x in zip(costs, ideal(level), strict=True))

    points = sorted({Fraction(bound, c) for c, *both in zip(importance, minimum, caps, strict=True) for bound in both})
    low = max([Fraction(0), *(p for p in points if total(p) <= budget)])
    high = min(p for p in points if total(p) > budget)
    slope = (total(high) - total(low)) / (high - low)
    x = ideal(low + (budget - total(low)) / slope)
    ranks = [int(each) for each in x]
    left = budget - sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
    order = sorted(range(len(x)), key=lambda unit: (ranks[unit] - x[unit], unit))
    again = True
    while again:
        again = False
        for unit in order:
            if ranks[unit] < caps[unit] and costs[unit] <= left:
                ranks[unit] += 1
                left -= costs[unit]
                again = True
    return ranks, x


@settings(max_examples=300, deadline=None)
@given(problems(unimportant=False))
def test_equals_the_rule_in_fractions(problem):
    importance, costs, caps, budget, minimum = problem
    assume(sum(np.multiply(costs, caps)) > budget)
    expected, x = exact(*problem)
    fractions = sorted(each - int(each) for each in x)
    # Remainders that are equal, or one rank from the next, are ordered by rounding.
    assume(fractions[-1] < 1 - Fraction(1, 10**9))
    assume(all(b == a == 0 or b - a > Fraction(1, 10**9) for a, b in pairwise(fractions)))
    found = ranks_by_importance(importance, costs, caps, budget, minimum=minimum)
    assert found.tolist() == expected


def test_equal_importance_gives_ranks_that_differ_by_at_most_one_and_favours_the_first():
    assert ranks_by_importance(np.full(6, 0.1), 7, 50, 7 * 20).tolist() == [4, 4, 3, 3, 3, 3]


def test_more_importance_never_means_less_rank():
    rng = np.random.default_rng(0)
    importance = np.sort(rng.pareto(1.0, size=200))
    ranks = ranks_by_importance(importance, 5120, 2048, 5120 * 20_000)
    assert np.all(np.diff(ranks) >= 0)
    assert ranks.sum() == 20_000


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-30, 2.0**60])
def test_the_scale_of_importance_does_not_matter(scale):
    importance = np.random.default_rng(1).pareto(1.0, size=40)
    expected = ranks_by_importance(importance, 11, 90, 11_000)
    np.testing.assert_array_equal(ranks_by_importance(importance * scale, 11, 90, 11_000), expected)


def test_units_without_importance_take_what_the_others_cannot():
    assert ranks_by_importance([1.0, 0.0, 0.0], 1, [4, 9, 9], 12, minimum=0).tolist() == [4, 4, 4]
    assert ranks_by_importance([1.0, 0.0, 0.0], 1, [40, 9, 9], 12).tolist() == [10, 1, 1]
    assert ranks_by_importance([1.0, 0.0, 0.0], 1, [40, 9, 9], 12, minimum=0).tolist() == [12, 0, 0]
    assert ranks_by_importance([0.0, 0.0], 1, 9, 8).tolist() == [4, 4], "no importance at all: equal shares"


def test_importance_of_any_range():
    assert ranks_by_importance([1.0, 5e-324], 1, 10**12, 10**12 + 7).tolist() == [10**12, 7]
    assert ranks_by_importance([1.0, 1e-300], 3, 10**6, 3 * 10**6 + 30).tolist() == [10**6, 10]


def test_budgets_beyond_single_precision_are_exact():
    budget = 2**55 + 1
    costs = np.array([3, 5])
    ranks = ranks_by_importance([1.0, 2.0], costs, 2**60 // 8, budget)
    assert 0 <= budget - int(ranks @ costs) < 3


def test_no_cap_at_all_does_not_overflow():
    assert ranks_by_importance([3.0, 1.0], 1000, np.iinfo(np.int64).max, 8000).tolist() == [6, 2]


def test_a_dear_unit_leaves_the_rest_to_a_cheap_one():
    assert ranks_by_importance([1.0, 1.0], [100, 1], [10, 10**6], 999).tolist() == [9, 99]


def test_all_caps_where_affordable_and_no_units():
    assert ranks_by_importance([1.0, 2.0], 3, [4, 5], 27).tolist() == [4, 5]
    assert ranks_by_importance([], 1, 1, 0).tolist() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 1.0], [5, 7], 9, 11), "budget of 11 numbers is out of reach: the least is 12"),
        (([1.0, -1.0], 5, 9, 90), r"importance: -1.0 of unit 1;"),
        (([1.0, np.nan], 5, 9, 90), r"importance: nan of unit 1;"),
        (([1.0, 1.0], [5, 0], 9, 90), "costs: 0 of unit 1; give whole numbers of at least 1"),
        (([1.0, 1.0], [5, 1.5], 9, 90), "costs: 1.5 of unit 1"),
        (([1.0, 1.0], [5, 1, 1], 9, 90), r"costs has shape \(3,\)"),
        (([1.0, 1.0], 5, [0, 9], 90), "minimum: 1 of unit 0; give no more than the cap"),
        (([1.0, 1.0], 5, [np.nan, 9], 90), "caps: nan of unit 0"),
        (([[1.0, 1.0]], 5, 9, 90), "one number for each unit"),
        (([1.0, 1.0], ["5", "6"], 9, 90), "costs is of type"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(JaxmoeError, match=message):
        ranks_by_importance(*arguments)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=40).filter(any), st.integers(0, 40_000))
def test_floors_as_printed(counts, total):
    fractions = np.array(counts) / sum(counts)
    found = floor_ranks(fractions, total)
    assert found.tolist() == [max(1, int(total * fraction)) for fraction in fractions.tolist()]
    assert found.dtype == np.int64


def test_floors_lose_ranks_that_the_exact_rule_hands_out():
    """Qwen3-30B-A3B at 20 % of gate and up: 32 groups of 4 experts, 30,276 ranks in all, see the paper's setting."""
    importance = np.random.default_rng(0).dirichlet(np.full(32, 60.0))
    printed = floor_ranks(importance, 30_276)
    found = ranks_by_importance(importance, 5120, 2048, 30_276 * 5120)
    assert 0 < 30_276 - printed.sum() <= 32
    assert found.sum() == 30_276
    assert np.all((found == printed) | (found == printed + 1))
