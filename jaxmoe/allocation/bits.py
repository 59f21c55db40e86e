"""Who gets how many bits: one option for each unit under an exact budget, by what every option is known to lose.

    minimise  sum_u loss[u, o_u]        subject to  sum_u cost[u, o_u] <= budget

A unit is whatever has bits of its own, such as one expert's matrix; an option is a width. This multiple-choice knapsack
is solved from its Lagrangian bound (Sinha and Zoltners 1979): the steps along the lower convex hulls of all units, best
first, spend the budget but for less than one step; exchanges between two units use what is left; options that the bound
proves to be in no better choice are dropped, and where what remains is small, an integer programme finds the optimum
(HiGHS, through `scipy.optimize.milp`). Every result says how far from the optimum it can be at most.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import Bounds, LinearConstraint, milp

from jaxmoe.allocation.spending import spend
from jaxmoe.errors import JaxmoeError

MOST = 3_000
"""Options of all units, after those that cannot be in an optimum are dropped, of which an integer programme is made."""

NODES = 2_000
"""Nodes that its search may take; a limit in seconds would give other bits on another machine."""

EXCHANGES = 1_000
"""Exchanges between two units at most; with equal units a handful are made."""


class Choice(NamedTuple):
    """An option for each unit.

    options: index of the option of each unit, int64 `[unit]`; loss: their sum; cost: their sum; bound: no choice within
    the budget loses less.
    """

    options: np.ndarray
    loss: float
    cost: int
    bound: float

    @property
    def gap(self) -> float:
        """How much more than the optimum it may lose, as a fraction of it."""
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / self.loss


def choose_bits(costs: ArrayLike, losses: ArrayLike, budget: int) -> Choice:
    """Return the option of each unit that loses least in all, within a budget.

    Units that are equal in everything get the dearer options in their order. Options that cost more and lose no less
    than another are never chosen.

    Args:
        costs: of every option of every unit, whole numbers `[unit, option]`, such as bytes.
        losses: of the same, finite and of one unit of measure, such as nats per token.
        budget: what the chosen options may cost together.

    Raises:
        JaxmoeError: not even the cheapest options fit, or an argument is none; the message names the range.

    Example:
        >>> costs = np.outer([100, 100, 200], [2, 3, 4, 8])
        >>> losses = [[10, 3, 1, 0], [4, 0.9, 0.3, 0], [30, 8, 2, 0]]
        >>> choice = choose_bits(costs, losses, 1300)
        >>> choice.options.tolist(), round(choice.loss, 6), choice.cost
        ([1, 0, 2], 9.0, 1300)
    """
    cost, loss = _checked(costs, losses)
    if not len(cost):
        return Choice(np.zeros(0, np.int64), 0.0, 0, 0.0)
    least = int(cost.min(1).sum())
    if budget < least:
        most = int(cost[np.arange(len(cost)), _best(cost, loss)].sum())
        raise JaxmoeError(f"a budget of {budget} is out of reach: from {least} to {most} can be spent")
    price, chosen = _along_hulls(cost, loss, budget)
    reduced = loss + price * cost
    bound = float(reduced.min(1).sum() - price * budget)

    def promising() -> np.ndarray:
        """Return the options without which nothing better than what is known can be, by the bound."""
        found = reduced - reduced.min(1, keepdims=True) <= _total(loss, chosen) - bound
        found[np.arange(len(cost)), chosen] = True
        return found

    if _total(loss, chosen) > bound:
        chosen = _exchanged(cost, loss, promising(), chosen, budget)
    if _total(loss, chosen) > bound:
        open_ = promising()
        if open_.sum() - (open_.sum(1) == 1).sum() <= MOST:
            chosen, bound = _programme(cost, loss, open_, chosen, budget, bound)
    chosen = _in_order(cost, loss, chosen)
    total = _total(loss, chosen)
    return Choice(chosen, total, _total(cost, chosen), min(bound, total))


def joined(values: ArrayLike, groups: ArrayLike) -> np.ndarray:
    """Return what every option costs or loses where the units of a group all take the same, `[group, option]`.

    Args:
        values: of each unit, `[unit, option]`.
        groups: the group of each unit, 0 to the number of groups - 1, `[unit]`.

    Example:
        >>> joined([[1, 2], [10, 20], [5, 6]], [0, 1, 0]).tolist()
        [[6, 8], [10, 20]]
    """
    given, group = np.asarray(values), np.asarray(groups)
    found = np.zeros((int(group.max(initial=-1)) + 1, given.shape[1]), given.dtype)
    np.add.at(found, group, given)
    return found


def _checked(costs: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    cost, loss = np.asarray(costs), np.asarray(losses, np.float64)
    if cost.ndim != 2 or cost.shape != loss.shape or not cost.shape[1]:
        raise JaxmoeError(f"costs {cost.shape} and losses {loss.shape}: give both as [unit, option], of equal shapes")
    if not np.issubdtype(cost.dtype, np.integer) or (cost < 0).any():
        raise JaxmoeError("costs: give whole numbers of at least 0")
    if not np.isfinite(loss).all():
        units = np.flatnonzero(~np.isfinite(loss).all(1))
        raise JaxmoeError(f"losses of units {units[:8].tolist()} are not finite: measure them again")
    return cost.astype(np.int64), loss


def _total(values: np.ndarray, chosen: np.ndarray):
    return values[np.arange(len(values)), chosen].sum().item()


def _best(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return the option of least loss of each unit, the cheapest of these."""
    return np.lexsort((cost, loss), axis=1)[:, 0]


def _along_hulls(cost: np.ndarray, loss: np.ndarray, budget: int) -> tuple[float, np.ndarray]:
    """Spend the budget on the steps of all units' lower convex hulls, those first that gain most for what they cost.

    Returns the gain for its cost of the first step that is too dear, which is the optimal multiplier of the budget, and
    the options.
    """
    start = np.lexsort((loss, cost), axis=1)[:, 0]
    current, path = start.copy(), [start]
    rows = np.arange(len(cost))
    slopes, prices = [], []
    # One step of every unit at a time: to the option with the steepest way down among the dearer ones.
    for _ in range(cost.shape[1] - 1):
        more = cost - cost[rows, current][:, None]
        gain = loss[rows, current][:, None] - loss
        slope = np.where((more > 0) & (gain > 0), gain / np.maximum(more, 1), 0.0)
        # Of equally steep ways the shorter: the other lies behind it.
        following = np.lexsort((more, -slope), axis=1)[:, 0]
        steepest = slope[rows, following]
        following = np.where(steepest > 0, following, current)
        slopes.append(steepest)
        prices.append(cost[rows, following] - cost[rows, current])
        path.append(following)
        current = following
    if not slopes:
        return 0.0, start
    slope, price = np.stack(slopes, 1), np.stack(prices, 1)
    unit, number = np.nonzero(slope > 0)
    # Hulls are convex, so that sorting leaves the steps of a unit in their order; a stable sort, lower units first.
    order = np.lexsort((number, unit, -slope[unit, number]))
    unit, number = unit[order], number[order]
    bought = spend(unit, price[unit, number], len(cost), budget - int(cost[rows, start].sum()))
    refused = 0.0 if bought.refused is None else float(slope[unit[bought.refused], number[bought.refused]])
    return refused, np.stack(path, 1)[rows, bought.taken]


def _exchanged(cost: np.ndarray, loss: np.ndarray, open_: np.ndarray, chosen: np.ndarray, budget: int) -> np.ndarray:
    """Move one unit, or two at once, to other open options as long as that loses less and the budget allows it."""
    chosen = chosen.copy()
    unit, option = np.nonzero(open_)
    for _ in range(EXCHANGES):
        left = budget - _total(cost, chosen)
        more = cost[unit, option] - cost[unit, chosen[unit]]
        gain = loss[unit, chosen[unit]] - loss[unit, option]
        pair = _best_pair(more, gain, unit, left)
        if pair is None:
            break
        for move in pair:
            chosen[unit[move]] = option[move]
    return chosen


def _best_pair(more: np.ndarray, gain: np.ndarray, unit: np.ndarray, left: int) -> tuple[int, int] | None:
    """Return the two moves of different units that gain most together within what is left; staying is a move, too.

    With the moves in order of cost, the best partner of a move is the best of all that are cheap enough, or, where that
    is one of the same unit, the best of the others: two running maxima.
    """
    order = np.lexsort((np.arange(len(more)), more))
    best, second = _running(gain[order], unit[order])
    reach = np.searchsorted(more[order], left - more, side="right") - 1
    able = np.flatnonzero(reach >= 0)
    partner = np.full(len(more), -1)
    first = best[reach[able]]
    own = unit[order][first] == unit[able]
    partner[able] = np.where(own, second[reach[able]], first)
    found = np.flatnonzero(partner >= 0)
    if not len(found):
        return None
    sums = gain[found] + gain[order][partner[found]]
    top = int(np.argmax(sums))
    # Against endless exchanges of what is equal but for rounding.
    if sums[top] <= 1e-12 * np.abs(gain).max():
        return None
    return int(found[top]), int(order[partner[found[top]]])


def _running(gain: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each position the best one so far, and the best one so far of another unit, -1 where there is none."""
    best, second = np.empty(len(gain), np.int64), np.empty(len(gain), np.int64)
    top, other = -1, -1
    for position, own in enumerate(gain.tolist()):
        if top < 0 or own > gain[top]:
            if top >= 0 and unit[top] != unit[position]:
                other = top
            top = position
        elif unit[position] != unit[top] and (other < 0 or own > gain[other]):
            other = position
        best[position], second[position] = top, other
    return best, second


def _programme(
    cost: np.ndarray, loss: np.ndarray, open_: np.ndarray, known: np.ndarray, budget: int, bound: float
) -> tuple[np.ndarray, float]:
    """Return the optimum among the open options, or what was known, and the bound that the search has proven."""
    free = np.flatnonzero(open_.sum(1) > 1)
    if not len(free):
        return known, _total(loss, known)
    unit, option = np.nonzero(open_[free])
    unit = free[unit]
    rest = budget - _total(cost, known) + int(cost[free, known[free]].sum())
    scale = np.gcd.reduce(np.append(cost[unit, option], 0)) or 1
    weights = loss[unit, option]
    size = np.ptp(weights) or 1.0
    one_each = (unit[None, :] == free[:, None]).astype(np.float64)
    found = milp(
        weights / size,
        integrality=np.ones(len(unit)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost[unit, option][None, :] / scale, -np.inf, rest // scale),
        ],
        options={"node_limit": NODES, "mip_rel_gap": 0.0},
    )
    fixed = _total(loss, known) - loss[free, known[free]].sum()
    proven = getattr(found, "mip_dual_bound", None)
    if proven is not None and np.isfinite(proven):
        bound = max(bound, fixed + proven * size)
    if found.x is None:
        return known, bound
    taken = np.flatnonzero(found.x > 0.5)
    chosen = known.copy()
    chosen[unit[taken]] = option[taken]
    # The solver works within tolerances: what it found counts only where it holds exactly.
    better = _total(cost, chosen) <= budget and _total(loss, chosen) < _total(loss, known)
    return (chosen if better else known), bound


def _in_order(cost: np.ndarray, loss: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Give the dearer options to the lower ones of units that are equal."""
    _, group = np.unique(np.concatenate([cost.astype(np.float64), loss], axis=1), axis=0, return_inverse=True)
    group = group.reshape(-1)
    places = np.lexsort((np.arange(len(cost)), group))
    dearness = -cost[np.arange(len(cost)), chosen]
    ordered = np.lexsort((np.arange(len(cost)), dearness, group))
    found = chosen.copy()
    found[places] = chosen[ordered]
    return found
