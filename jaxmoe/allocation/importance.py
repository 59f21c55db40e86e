"""Ranks in proportion to importance, within caps, spending a budget of stored numbers exactly.

    x_u  =  clip(lambda C_u, minimum_u, cap_u)        with lambda such that  sum_u cost_u x_u  =  budget

C_u is the importance of unit u and cost_u what one rank of it stores. Ranks are whole: each unit first takes
floor(x_u), then single ranks go to the units in order of what the floor took from them (the largest remainder), pass
after pass, until none fits. What is left is smaller than the cheapest rank that a unit below its cap could still take.

Units without any importance share, equally, what the important ones could not take up to their caps. `floor_ranks` is
the rule as RFID-MoE prints it: it loses up to one rank per unit, and knows neither caps nor costs.
Cost: microseconds to milliseconds for thousands of units. It does not say what importance is: see `jaxmoe.scores`.
Source: RFID-MoE, arXiv 2602.09316, section 3.2; caps, costs and the remainder are ours.
"""

import numpy as np
from numpy.typing import ArrayLike

from jaxmoe.allocation.units import check_bounds, check_budget, score, whole


def ranks_by_importance(
    importance: ArrayLike, costs: ArrayLike, caps: ArrayLike, budget: int, *, minimum: ArrayLike = 1
) -> np.ndarray:
    """Return the rank of every unit, int64, in proportion to importance, so that the budget is spent.

    Args:
        importance: of each unit, `[unit]`, finite and at least 0, in any common scale.
        costs: numbers that one rank of a unit stores, `[unit]` or one for all; at least 1.
        caps: largest rank of each unit, `[unit]` or one for all.
        budget: numbers that may be stored in all.
        minimum: smallest rank of each unit, `[unit]` or one for all; 0 lets a unit go without.

    Returns:
        `[unit]`: 0 <= budget - sum cost rank < the least cost among units below their caps; all caps if affordable.

    Raises:
        JaxmoeError: the budget does not reach for the minimum, a minimum exceeds a cap, or a number is not valid.

    Source:
        RFID-MoE, arXiv 2602.09316, Eq. 13 as a floor that wastes nothing.

    Example:
        >>> ranks_by_importance([0.5, 0.3, 0.2], 10, 100, 205).tolist()
        [10, 6, 4]
        >>> ranks_by_importance([0.5, 0.3, 0.2], 10, [7, 100, 100], 205).tolist()
        [7, 8, 5]
    """
    importance = score("importance", importance)
    units = len(importance)
    costs = whole("costs", costs, units, least=1)
    caps = whole("caps", caps, units, least=0)
    minimum = whole("minimum", minimum, units, least=0)
    check_bounds(minimum, caps)
    check_budget(_spent(costs, minimum), budget)
    # No unit can take more than the whole budget: sums of costs stay far from the end of int64, whatever the caps.
    caps = np.minimum(caps, budget // costs + 1)
    if _spent(costs, caps) <= budget:
        return caps

    weighty = importance > 0
    full = np.where(weighty, caps, minimum)
    if _spent(costs, full) <= budget:
        # However large lambda is, the important units cannot spend the budget: the others take part as equals.
        minimum, importance = full, np.where(weighty, 0.0, 1.0)
    ideal = _proportional(importance, costs, caps, minimum, budget)
    ranks = np.floor(ideal).astype(np.int64)
    order = np.argsort(ranks - ideal, kind="stable")
    return _hand_out(ranks, costs, caps, order, budget - _spent(costs, ranks))


def floor_ranks(importance: ArrayLike, total: int) -> np.ndarray:
    """Return max(1, floor(total C)) of every unit, int64, uncapped: the rule as RFID-MoE prints it.

    Args:
        importance: C of each unit, `[unit]`, a fraction in [0, 1]; they sum to 1.
        total: ranks to share out.

    Returns:
        `[unit]`; the sum misses `total` by up to one rank per unit, or exceeds it where many units have no importance.

    Source:
        RFID-MoE, arXiv 2602.09316, Eq. 13.

    Example:
        >>> floor_ranks([0.62, 0.38, 0.0], 10).tolist()
        [6, 3, 1]
    """
    return np.maximum(1, np.floor(total * score("importance", importance))).astype(np.int64)


def _spent(costs: np.ndarray, ranks: np.ndarray) -> int:
    return int(costs @ ranks)


def _proportional(importance, costs, caps, minimum, budget) -> np.ndarray:
    """Return clip(lambda importance, minimum, caps), float64, for the largest lambda that the budget allows."""
    importance = importance / importance.max()

    def ideal(level):
        with np.errstate(over="ignore"):
            return np.clip(level * importance, minimum, caps)

    def affordable(level):
        # The sum of floors is exact, which the sum of fractions is not: no rounding may exceed the budget.
        found = ideal(level)
        return costs @ found <= budget and _spent(costs, np.floor(found).astype(np.int64)) <= budget

    low, high = 0.0, 1.0
    while affordable(high) and high < np.finfo(np.float64).max / 2:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return ideal(low)


def _hand_out(ranks, costs, caps, order, left) -> np.ndarray:
    """Give single ranks to units in turn, pass after pass, while any fits."""
    while len(order := order[(ranks[order] < caps[order]) & (costs[order] <= left)]):
        round_cost = int(costs[order].sum())
        if round_cost <= left:
            # Passes in which every unit gets its rank are alike: all of them at once.
            rounds = min(left // round_cost, int((caps - ranks)[order].min()))
            ranks[order] += rounds
            left -= rounds * round_cost
            continue
        for unit in order:
            if costs[unit] <= left:
                ranks[unit] += 1
                left -= int(costs[unit])
    return ranks
