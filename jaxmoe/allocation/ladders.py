"""Exact integer budgets over slots: what is stored never exceeds what was asked, and hardly falls short of it.

Every slot (one target of one layer) is a ladder: at level l it stores fixed + step * l numbers, for low <= l <= high. A
budget is spent so that every slot keeps the share that a rule gives it (`shares`) as nearly as integers allow, and what
is left over is smaller than the cheapest step that any slot below its cap could still take.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxmoe.allocation.shares import Shares
from jaxmoe.errors import JaxmoeError

TURNS = 16
"""Times that a budget is spent anew with what sizes turned out to be."""


class Ladder(NamedTuple):
    """Sizes that one slot can take, in numbers: `fixed + step * level` for `low <= level <= high`; `dense` untouched.

    Example:
        >>> Ladder(dense=100, fixed=4, step=10, low=1, high=9).numbers(3)
        34
    """

    dense: int
    fixed: int
    step: int
    low: int
    high: int

    def numbers(self, level: int) -> int:
        """Return the numbers stored at a level."""
        return self.fixed + self.step * level

    def floor(self, budget: float) -> int:
        """Return the highest level within a budget, inside the ladder's bounds (`low` even where that exceeds it)."""
        return min(self.high, max(self.low, int((budget - self.fixed) // self.step)))


def kept_fractions(sizes: Sequence[int], shares: Shares, budget: float) -> list[float]:
    """Return what every slot keeps if a budget could be spent to the last number.

    Args:
        sizes: dense numbers of each slot.
        shares: the rule.
        budget: numbers that may be stored in all.

    Example:
        >>> from jaxmoe.allocation.shares import by_odds
        >>> [round(kept, 6) for kept in kept_fractions([90, 90], by_odds([1.0, 5.0]), 105)]
        [0.5, 0.666667]
    """

    def within(level):
        return sum(kept * size for kept, size in zip(shares(level), sizes, strict=True)) <= budget

    return list(shares(_bisect(within)))


def reachable(ladders: Sequence[Ladder]) -> tuple[int, int]:
    """Return the smallest and largest number of stored numbers.

    Example:
        >>> reachable([Ladder(100, 4, 10, 1, 9), Ladder(100, 0, 20, 1, 4)])
        (34, 174)
    """
    return sum(x.numbers(x.low) for x in ladders), sum(x.numbers(x.high) for x in ladders)


def allocate(ladders: Sequence[Ladder], budget: int, shares: Shares) -> tuple[int, ...]:
    """Return the level of every slot: each its share, stored <= budget, rest below the cheapest step.

    Each slot first takes the highest level within its share at a common level of the rule, found by bisection; single
    steps then go to the slots that fell shortest of it, in order of their position where equal.

    Args:
        ladders: one per slot.
        budget: numbers that may be stored in all.
        shares: the rule.

    Raises:
        JaxmoeError: the budget lies outside `reachable(ladders)`, below or more than one step above.

    Example:
        >>> from jaxmoe.allocation.shares import by_odds
        >>> allocate([Ladder(100, 0, 10, 1, 9), Ladder(100, 0, 10, 1, 9)], 110, by_odds([1.0, 1.0]))
        (6, 5)
    """
    least, most = reachable(ladders)
    if budget < least or (ladders and budget >= most + min(x.step for x in ladders)):
        raise JaxmoeError(f"a budget of {budget} numbers is out of reach: {least} to {most} can be stored")

    def wanted(level):
        return [kept * ladder.dense for kept, ladder in zip(shares(level), ladders, strict=True)]

    def at(level):
        return [ladder.floor(numbers) for ladder, numbers in zip(ladders, wanted(level), strict=True)]

    def spent(levels):
        return sum(ladder.numbers(level) for ladder, level in zip(ladders, levels, strict=True))

    common = _bisect(lambda level: spent(at(level)) <= budget)
    levels = at(common)
    rest = budget - spent(levels)

    shortfall = [
        numbers - ladder.numbers(level) for ladder, level, numbers in zip(ladders, levels, wanted(common), strict=True)
    ]
    order = sorted(range(len(ladders)), key=lambda i: (-shortfall[i] / ladders[i].step, i))
    progress = True
    while progress:
        progress = False
        for i in order:
            if levels[i] < ladders[i].high and ladders[i].step <= rest:
                levels[i] += 1
                rest -= ladders[i].step
                progress = True
    return tuple(levels)


def allocate_counted(
    ladders: Sequence[Ladder], budget: int, shares: Shares, size: Callable[[Sequence[int]], int]
) -> tuple[int, ...]:
    """Return the level of every slot as `allocate` does, where sizes do not lie quite on the ladders.

    Packed codes fill whole words and groups of them share a scale, so that a step costs now more and now less. What
    the ladders misjudge is added to the budget, or taken off it, until nothing changes.

    Args:
        ladders: one per slot, as nearly as ladders have it.
        budget: what may be stored in all.
        shares: the rule.
        size: what is stored in all at some levels.

    Raises:
        JaxmoeError: the budget is out of reach.

    Example:
        >>> from jaxmoe.allocation.shares import by_odds
        >>> ladders, words = [Ladder(100, 0, 10, 1, 9)] * 2, lambda levels: sum(16 * -(-10 * x // 16) for x in levels)
        >>> levels = allocate_counted(ladders, 112, by_odds([1.0, 1.0]), words)
        >>> levels, words(levels)
        ((5, 4), 112)
    """
    least, most = reachable(ladders)
    asked, tried, best = budget, set(), None
    while asked not in tried and len(tried) < TURNS:
        tried.add(asked)
        levels = allocate(ladders, asked, shares)
        rest = budget - size(levels)
        if rest == budget - sum(ladder.numbers(level) for ladder, level in zip(ladders, levels, strict=True)):
            return levels
        if rest >= 0 and (best is None or rest < best[0]):
            best = rest, levels
        asked = min(max(asked + rest, least), most)
    if best is None:
        raise JaxmoeError(f"a budget of {budget} is out of reach, but hardly: choose a slightly larger one")
    return best[1]


def _bisect(within) -> float:
    """Return the largest level in [0, 1], as nearly as floats have it, that is within; 0 even if that is not."""
    if within(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low
