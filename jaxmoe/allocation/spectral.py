"""Ranks where they keep the most energy: one water level over the spectra of all units.

    maximise  sum_u sum_{i <= rank_u} energy_ui    subject to  sum_u cost_u rank_u <= budget

Energies are squared singular values of (weighted) matrices, descending: a rank of unit u keeps energy_ui, its squared
error falls by as much, and the gains of further ranks only shrink. So the ranks of largest energy per stored number are
taken, whatever unit they belong to: no other ranks of the same cost keep more (Everett 1963). What is left over for the
next best rank then goes to cheaper ones that fit.

Cost: one sort, O(n log n) for n energies; a million take about half a second. It assumes that errors of units add
up and weigh alike: multiply a unit's energies by what its error costs otherwise.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxmoe.allocation.spending import join, spend
from jaxmoe.allocation.units import check_bounds, check_budget, whole


def water_fill(
    energies: ArrayLike | Sequence[ArrayLike],
    costs: ArrayLike,
    budget: int,
    *,
    minimum: ArrayLike = 0,
    caps: ArrayLike | None = None,
) -> tuple[np.ndarray, float]:
    """Return the ranks that keep the most energy, and the energy per number at which the budget ran out.

    Args:
        energies: of each unit in descending order, `[unit, k]` or one list per unit; finite and at least 0.
        costs: numbers that one rank of a unit stores, `[unit]` or one for all; at least 1.
        budget: numbers that may be stored in all.
        minimum: smallest rank of each unit, `[unit]` or one for all.
        caps: largest rank of each unit, `[unit]` or one for all; never more than it has energies, as None means.

    Returns:
        ranks: int64 `[unit]`, 0 <= budget - sum cost rank < the least cost among units below their caps. Ranks of equal
            energy per number go to the first unit.
        threshold: energy per number of the best rank that was too dear: all that is above it was kept, up to the caps;
            0 if nothing was refused.

    Raises:
        JaxmoeError: the budget does not reach for the minimum, a minimum exceeds a cap, or a number is not valid.

    Source:
        Lagrange multipliers for concave gains: Everett, Operations Research 11, 1963.

    Example:
        >>> ranks, threshold = water_fill([[9.0, 4.0, 1.0], [5.0, 3.0, 2.0]], costs=10, budget=45)
        >>> ranks.tolist(), threshold
        ([2, 2], 0.2)
    """
    flat, lengths = join("energies", energies)
    units = len(lengths)
    costs = whole("costs", costs, units, least=1)
    minimum = whole("minimum", minimum, units, least=0)
    limit = lengths if caps is None else np.minimum(lengths, whole("caps", caps, units, least=0))
    check_bounds(minimum, limit)
    least = int(costs @ minimum)
    check_budget(least, budget)

    owners = np.repeat(np.arange(units), lengths)
    levels = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    wanted = np.flatnonzero((levels >= minimum[owners]) & (levels < limit[owners]))
    gains = flat[wanted] / costs[owners[wanted]]
    order = np.argsort(-gains, kind="stable")
    steps = wanted[order]
    bought = spend(owners[steps], costs[owners[steps]], units, budget - least)
    threshold = 0.0 if bought.refused is None else float(gains[order[bought.refused]])
    return minimum + bought.taken, threshold
