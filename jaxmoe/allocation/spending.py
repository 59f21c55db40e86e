"""Spend a budget down a list of steps, best first, where each unit's own steps come in order.

The longest beginning of the list that the budget affords is taken whole. The first step that is too dear closes its
unit; the rest is left for the steps further down that still fit. So what is left is smaller than the next step of every
unit, and nothing better than the first refused step was left out.

Cost: one cumulative sum for each different price of a step, whatever their number.
"""

from typing import NamedTuple

import numpy as np

from jaxmoe.errors import JaxmoeError


class Spending(NamedTuple):
    """What was bought.

    taken: steps of each unit, int64 `[unit]`; refused: index in the list of the first step that was too dear, or None.
    """

    taken: np.ndarray
    refused: int | None


def spend(owners: np.ndarray, costs: np.ndarray, units: int, budget: int) -> Spending:
    """Return how many steps of each unit a budget buys, in the order of the list.

    Args:
        owners: unit of each step, `[step]`, best step first; the steps of one unit are in its own order.
        costs: of each step, int64 `[step]`, at least 1.
        units: how many there are.
        budget: at least 0.

    Example:
        >>> spend(np.array([0, 1, 0, 1, 1]), np.array([5, 2, 5, 2, 2]), 2, 11)
        Spending(taken=array([1, 3]), refused=2)
    """
    taken = np.zeros(units, np.int64)
    refused = None
    left = int(budget)
    places = np.arange(len(owners))
    while len(places):
        total = np.cumsum(costs[places])
        count = int(np.searchsorted(total, left, side="right"))
        taken += np.bincount(owners[places[:count]], minlength=units)
        left -= int(total[count - 1]) if count else 0
        places = places[count:]
        if len(places) and refused is None:
            refused = int(places[0])
        _, first = np.unique(owners[places], return_index=True)
        open_ = np.zeros(units, bool)
        open_[owners[places[first]]] = costs[places[first]] <= left
        places = places[open_[owners[places]]]
    return Spending(taken, refused)


def join(name: str, ragged) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of all units one after the other, float64, and how many each unit has, int64.

    Raises:
        JaxmoeError: if those of a unit are not finite, below zero or not in descending order.

    Example:
        >>> join("energies", [[4.0, 1.0], [9.0]])
        (array([4., 1., 9.]), array([2, 1]))
    """
    rows = [np.asarray(row, np.float64) for row in ragged]
    if wrong := [unit for unit, row in enumerate(rows) if row.ndim != 1]:
        raise JaxmoeError(f"{name} of units {wrong[:8]} are not lists of numbers: give [unit, k] or one list per unit")
    lengths = np.array([len(row) for row in rows], np.int64)
    flat = np.concatenate(rows) if rows else np.zeros(0)
    bad = ~np.isfinite(flat) | (flat < 0)
    bad[1:] |= (flat[1:] > flat[:-1]) & (np.diff(np.repeat(np.arange(len(rows)), lengths)) == 0)
    if bad.any():
        units = np.unique(np.repeat(np.arange(len(rows)), lengths)[bad])
        raise JaxmoeError(
            f"{name} of units {units[:8].tolist()}: give finite numbers of at least 0, in descending order"
        )
    return flat, lengths
