"""Options of units under an exact budget: toys, exhaustive search, and what holds whatever the numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.allocation import bits
from jaxmoe.allocation.bits import choose_bits, joined
from jaxmoe.errors import JaxmoeError

COSTS = np.outer([100, 100, 200], [2, 3, 4, 8])
LOSSES = np.array([[10, 3, 1, 0], [4, 0.9, 0.3, 0], [30, 8, 2, 0]])


@pytest.mark.parametrize(
    ("budget", "options", "loss"),
    [
        (800, [0, 0, 0], 44.0),
        (1200, [1, 1, 1], 11.9),
        (1300, [1, 0, 2], 9.0),
        (1400, [1, 1, 2], 5.9),
        (3200, [3, 3, 3], 0.0),
        (10**12, [3, 3, 3], 0.0),
    ],
)
def test_toys(budget, options, loss):
    choice = choose_bits(COSTS, LOSSES, budget)
    assert choice.options.tolist() == options
    assert choice.loss == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert choice.gap < 1e-9


def exhaustive(costs, losses, budget):
    units = range(len(costs))
    return min(
        sum(losses[u, o] for u, o in zip(units, options))
        for options in itertools.product(range(costs.shape[1]), repeat=len(costs))
        if sum(costs[u, o] for u, o in zip(units, options)) <= budget
    )


@st.composite
def problems(draw):
    """Return costs and losses in any order, with equal ones among them, and a budget that can be kept."""
    units, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    numbers = st.lists(st.integers(1, 12), min_size=units * options, max_size=units * options)
    costs = np.array(draw(numbers)).reshape(units, options)
    losses = np.array(draw(numbers)).reshape(units, options) / 4
    return costs, losses, int(costs.min(1).sum()) + draw(st.integers(0, 40))


@given(problems())
@settings(deadline=None, max_examples=60)
def test_no_choice_loses_less(problem):
    costs, losses, budget = problem
    choice = choose_bits(costs, losses, budget)
    taken = np.arange(len(costs)), choice.options
    assert choice.cost == costs[taken].sum() <= budget
    assert choice.loss == pytest.approx(losses[taken].sum())
    assert choice.loss == pytest.approx(exhaustive(costs, losses, budget))
    assert choice.bound <= choice.loss


@given(problems())
@settings(deadline=None, max_examples=30)
def test_without_a_programme_the_bound_tells_how_far_it_may_be(problem):
    """Where there are too many units for an integer programme, as here, exchanges come close and the bound holds."""
    costs, losses, budget = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "MOST", -1)
        choice = choose_bits(costs, losses, budget)
    best = exhaustive(costs, losses, budget)
    assert choice.cost <= budget
    assert choice.bound <= best + 1e-9 <= choice.loss + 2e-9


def many(units, seed=0):
    """Return units as models have them: halved errors with every bit, some matrices larger, a few that matter most."""
    draw = np.random.default_rng(seed)
    numbers = np.where(np.arange(units) % 3, 8192, 16384)
    costs = (numbers[:, None] * np.array([2.25, 3.25, 4.25, 6.25]) / 8).astype(int)
    losses = draw.lognormal(0, 1.5, (units, 1)) * np.array([1, 0.25, 0.06, 0.004]) * draw.uniform(0.9, 1.1, (units, 4))
    return costs, losses


def test_thousands_of_units_lose_hardly_more_than_the_bound():
    costs, losses = many(6_000)
    budget = int(costs[:, 1].sum() * 1.1) + 123
    choice = choose_bits(costs, losses, budget)
    assert choice.gap < 1e-5
    # Every further bit would help: what is left is too little for any.
    dearer = costs - costs[np.arange(len(costs)), choice.options][:, None]
    assert 0 <= budget - choice.cost < dearer[dearer > 0].min()


def test_a_larger_budget_never_loses_more():
    costs, losses = many(24, seed=1)
    budgets = range(int(costs[:, 0].sum()), int(costs[:, -1].sum()) + 4000, 4000)
    found = [choose_bits(costs, losses, budget).loss for budget in budgets]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(found))


def test_equal_units_get_the_dearer_options_in_their_order():
    costs, losses = np.tile([2, 3, 4], (7, 1)), np.tile([9.0, 3.0, 1.0], (7, 1))
    assert choose_bits(costs, losses, 24).options.tolist() == [2, 2, 2, 1, 1, 1, 1]


def test_what_costs_more_and_loses_no_less_is_not_taken():
    assert choose_bits([[2, 3, 4]], [[1.0, 1.5, 1.0]], 10).options.tolist() == [0]


def test_units_of_a_group_take_the_same():
    """Joined, they are one unit; the best common option is that of the sums."""
    groups = [0, 1, 0]
    choice = choose_bits(joined(COSTS, groups), joined(LOSSES, groups), 1400)
    assert choice.options[groups].tolist() == [2, 0, 2]
    assert choice.loss == pytest.approx(1 + 4 + 2)


def test_no_units_cost_nothing():
    assert choose_bits(np.zeros((0, 3), int), np.zeros((0, 3)), 0).cost == 0


@pytest.mark.parametrize(
    ("costs", "losses", "budget", "match"),
    [
        (COSTS, LOSSES, 799, "a budget of 799 is out of reach: from 800 to 3200 can be spent"),
        (COSTS, LOSSES[:, :2], 900, r"costs \(3, 4\) and losses \(3, 2\): give both as \[unit, option\]"),
        (COSTS / 3, LOSSES, 900, "whole numbers"),
        (-COSTS, LOSSES, 900, "whole numbers"),
        (COSTS, np.where(LOSSES == 8, np.nan, LOSSES), 900, r"losses of units \[2\] are not finite"),
    ],
)
def test_bad_input(costs, losses, budget, match):
    with pytest.raises(JaxmoeError, match=match):
        choose_bits(costs, losses, budget)
