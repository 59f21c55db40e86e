"""Exact budgets: stored <= budget, the rest below the cheapest step, equal fractions."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.allocation import Ladder, by_odds, reachable
from jaxmoe.allocation import allocate as allocate_by
from jaxmoe.errors import JaxmoeError


def allocate(own, budget):
    return allocate_by(own, budget, by_odds([1.0] * len(own)))


@st.composite
def ladders(draw):
    step = draw(st.integers(1, 400))
    fixed = draw(st.integers(0, 500))
    low = draw(st.integers(1, 4))
    high = low + draw(st.integers(0, 60))
    dense = fixed + step * high + draw(st.integers(1, 2000))
    return Ladder(dense, fixed, step, low, high)


def stored(own, levels):
    return sum(ladder.numbers(level) for ladder, level in zip(own, levels, strict=True))


@settings(max_examples=300, deadline=None)
@given(st.lists(ladders(), min_size=1, max_size=12), st.floats(0, 1))
def test_budget_is_met_from_below_and_spent(own, share):
    least, most = reachable(own)
    budget = int(least + share * (most - least))
    levels = allocate(own, budget)
    rest = budget - stored(own, levels)
    assert rest >= 0
    open_steps = [ladder.step for ladder, level in zip(own, levels, strict=True) if level < ladder.high]
    assert not open_steps or rest < min(open_steps)
    assert all(ladder.low <= level <= ladder.high for ladder, level in zip(own, levels, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 50), st.floats(0.05, 0.95))
def test_equal_slots_differ_by_at_most_one_step(count, step, share):
    own = [Ladder(dense=step * 101, fixed=3, step=step, low=1, high=100)] * count
    least, most = reachable(own)
    levels = allocate(own, int(least + share * (most - least)))
    assert max(levels) - min(levels) <= 1
    assert list(levels) == sorted(levels, reverse=True), "what is left over goes to the first slots"


def test_small_problem_has_the_smallest_spread_of_fractions():
    own = [Ladder(100, 0, 10, 1, 9), Ladder(60, 0, 6, 1, 9)]
    levels = allocate(own, 80)
    best = min(
        (
            (abs(own[0].numbers(a) / 100 - own[1].numbers(b) / 60), -stored(own, (a, b)), (a, b))
            for a, b in itertools.product(range(1, 10), repeat=2)
            if stored(own, (a, b)) <= 80 and 80 - stored(own, (a, b)) < 6
        ),
    )
    assert levels == best[2]


def test_out_of_reach_names_the_range():
    own = [Ladder(100, 4, 10, 2, 9)]
    with pytest.raises(JaxmoeError, match="24 to 94"):
        allocate(own, 23)
    with pytest.raises(JaxmoeError, match="24 to 94"):
        allocate(own, 104)
