"""What every slot is to keep of its numbers, as a function of one common level between 0 (nothing) and 1 (everything).

A slot is one target of one layer. A rule returns a function of the level, never falling in it, that a budget picks the
level of (`allocate`). The rules differ in what they know of the slots:

    by_odds     nothing but a weight: odds of being kept, in full where all is kept and ever less below
    by_loss     what the loss would rise by, to second order, if all of a slot were removed: that decides the weights
    by_energy   the whole spectrum of every slot: one water level over all of them, as in `spectral.water_fill`
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxmoe.allocation.spending import join
from jaxmoe.allocation.units import score

Shares = Callable[[float], Sequence[float]]
"""The kept fraction of every slot, in [0, 1], at a common level."""


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


def by_odds(weights: Sequence[float]) -> Shares:
    """Return the rule that gives slots of equal weight equal fractions.

    Example:
        >>> by_odds([1.0, 1.0])(0.3)
        [0.3, 0.3]
    """
    return lambda level: [share(level, weight) for weight in weights]


def by_loss(sizes: ArrayLike, losses: ArrayLike) -> Shares:
    """Return the rule for slots whose removal costs unequal losses: odds in proportion to loss per number.

    Where little is removed this minimises sum_s loss_s rho_s^2 over the removed fractions rho_s at equal numbers: rho_s
    is in proportion to size_s / loss_s.

    Args:
        sizes: dense numbers of each slot, `[slot]`.
        losses: loss_s, in any common unit, `[slot]`; 0 for a slot that may go entirely.

    Example:
        >>> [round(kept, 3) for kept in by_loss([10, 10], [1.0, 4.0])(0.9)]
        [0.862, 0.952]
    """
    sizes, losses = score("sizes", sizes), score("losses", losses)
    density = losses / sizes
    # In units of the dearest: losses of any size neither overflow nor vanish.
    dearest = density.max(initial=0.0)
    density = np.maximum(density / dearest, 1e-3) if dearest > 0 else np.ones(len(density))
    # In units of what a number costs where the slots that are cheap have as much say as their size gives them.
    return by_odds((density * (sizes / density).sum() / sizes.sum()).tolist())


def by_energy(energies: Sequence[ArrayLike], costs: ArrayLike, sizes: ArrayLike) -> Shares:
    """Return the rule that cuts all slots' energies at one height.

    Args:
        energies: of each slot in descending order, one for each rank that it may have, in units of what they cost.
        costs: numbers that one rank of a slot stores, `[slot]`.
        sizes: dense numbers of each slot, `[slot]`.

    Example:
        >>> [round(kept, 2) for kept in by_energy([[9.0, 1.0], [5.0, 4.0]], [1, 1], [2, 2])(0.75)]
        [0.5, 1.0]
    """
    flat, lengths = join("energies", energies)
    costs, sizes = score("costs", costs), score("sizes", sizes)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    order = np.argsort(-flat / costs[owners], kind="stable")
    spent = np.cumsum(costs[owners][order])
    # Position in the common order of each slot's own energies: how many of them lie within a length of it.
    places = [np.flatnonzero(owners[order] == slot) for slot in range(len(lengths))]

    def shares(level: float):
        length = np.searchsorted(spent, level * spent[-1], side="right") if len(spent) else 0
        kept = [np.searchsorted(own, length) * cost / size for own, cost, size in zip(places, costs, sizes)]
        return [min(1.0, float(fraction)) for fraction in kept]

    return shares
