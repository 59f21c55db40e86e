"""Exact integer budgets: who gets how many ranks or bases, so that what is stored never exceeds what was asked.

Every slot (one target of one layer) is a ladder: at level l it stores fixed + step * l numbers, for low <= l <= high. A
budget is spent so that every slot keeps its share as nearly as integers allow, and what is left over is smaller than
the cheapest step that any slot below its cap could still take. Shares are equal fractions of the dense sizes, or
unequal ones where slots have weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxmoe.errors import JaxmoeError


class Ladder(NamedTuple):
    """Sizes that one slot can take, in numbers: `fixed + step * level` for `low <= level <= high`; `dense` untouched.

    `weight` raises the share of the slot, see `share`.

    Example:
        >>> Ladder(dense=100, fixed=4, step=10, low=1, high=9).numbers(3)
        34
    """

    dense: int
    fixed: int
    step: int
    low: int
    high: int
    weight: float = 1.0

    def numbers(self, level: int) -> int:
        """Return the numbers stored at a level."""
        return self.fixed + self.step * level

    def floor(self, budget: float) -> int:
        """Return the highest level within a budget, inside the ladder's bounds (`low` even where that exceeds it)."""
        return min(self.high, max(self.low, int((budget - self.fixed) // self.step)))


def share(fraction: float, weight: float) -> float:
    """Return the kept fraction of a slot where slots of weight 1 keep `fraction`.

    A weight multiplies the odds of being kept, in full where everything is kept and ever less below: it stands for what
    small errors cost, and where little is kept no error is small.

    Example:
        >>> share(0.5, 1.0), round(share(0.5, 5.0), 3), share(1.0, 5.0)
        (0.5, 0.667, 1.0)
    """
    odds = 1 + (weight - 1) * fraction**2
    return odds * fraction / (1 - fraction + odds * fraction)


def common_fraction(ladders: Sequence[Ladder], budget: float) -> float:
    """Return what slots of weight 1 keep if a budget could be spent to the last number, between 0 and 1.

    Example:
        >>> round(common_fraction([Ladder(90, 0, 1, 1, 89), Ladder(90, 0, 1, 1, 89, weight=5.0)], 105), 6)
        0.5
    """
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        within = sum(share(middle, ladder.weight) * ladder.dense for ladder in ladders) <= budget
        low, high = (middle, high) if within else (low, middle)
    return low


def reachable(ladders: Sequence[Ladder]) -> tuple[int, int]:
    """Return the smallest and largest number of stored numbers.

    Example:
        >>> reachable([Ladder(100, 4, 10, 1, 9), Ladder(100, 0, 20, 1, 4)])
        (34, 174)
    """
    return sum(x.numbers(x.low) for x in ladders), sum(x.numbers(x.high) for x in ladders)


def allocate(ladders: Sequence[Ladder], budget: int) -> tuple[int, ...]:
    """Return the level of every slot: each its share, stored <= budget, rest below the cheapest step.

    Each slot first takes the highest level within its share of a common fraction, found by bisection; single steps then
    go to the slots that fell shortest of it, in order of their position where equal.

    Args:
        ladders: one per slot.
        budget: numbers that may be stored in all.

    Raises:
        JaxmoeError: the budget lies outside `reachable(ladders)`, below or more than one step above.

    Example:
        >>> allocate([Ladder(100, 0, 10, 1, 9), Ladder(100, 0, 10, 1, 9)], 110)
        (6, 5)
    """
    least, most = reachable(ladders)
    if budget < least or (ladders and budget >= most + min(x.step for x in ladders)):
        raise JaxmoeError(f"a budget of {budget} numbers is out of reach: {least} to {most} can be stored")

    def at(fraction):
        return [ladder.floor(share(fraction, ladder.weight) * ladder.dense) for ladder in ladders]

    def spent(levels):
        return sum(ladder.numbers(level) for ladder, level in zip(ladders, levels, strict=True))

    low, high = 0.0, 1.0
    if spent(at(high)) <= budget:
        low = high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(middle)) <= budget else (low, middle)
    levels = at(low)
    rest = budget - spent(levels)

    shortfall = [share(low, x.weight) * x.dense - x.numbers(level) for x, level in zip(ladders, levels, strict=True)]
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
