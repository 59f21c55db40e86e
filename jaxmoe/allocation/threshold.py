"""Ranks from one threshold on the spectra of all matrices: flat spectra stay, steep ones are cut.

    s'_i  =  (s_i - s_min) / (s_max - s_min),       rank  =  #{i : s'_i >= threshold}        one threshold for all

A pair of factors of rank r stores r (m + n) numbers, a matrix m n: a rank that is not below m n / (m + n) saves
nothing, so such a matrix stays dense, which is said by its full rank min(m, n). No factored rank is as large as that.
Every matrix keeps at least rank one; a spectrum whose values are all equal cannot be normalised and is first to stay
dense.

WeLore sets the threshold by hand, from tables of models and ratios. Here it follows from the budget: the steps of all
matrices, rank by rank up to dense, are bought in order of s' until the budget is gone. That is where a bisection on
the numbers stored at a threshold ends, exactly; what it leaves over buys the steps further down that still fit.

Cost: one sort of all singular values. It weighs matrices neither by size nor by use: see `water_fill` for what keeps
most energy.
Source: WeLore, arXiv 2407.11239, section 3.2; its released code lets a matrix grow, see the break-even above.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxmoe.allocation.spending import join, spend
from jaxmoe.allocation.units import check_budget
from jaxmoe.errors import JaxmoeError


def ranks_by_threshold(
    spectra: ArrayLike | Sequence[ArrayLike], shapes: Sequence[tuple[int, int]], budget: int
) -> tuple[np.ndarray, float]:
    """Return the ranks at one global threshold on normalised singular values, and the threshold.

    Args:
        spectra: singular values of each matrix, descending, `[matrix, min(m, n)]` or one list per matrix.
        shapes: (m, n) of each matrix.
        budget: numbers that may be stored in all.

    Returns:
        ranks: int64 `[matrix]`; min(m, n) means dense, at m n numbers; any other r stores r (m + n), fewer than m n.
            What is left of the budget is smaller than the next step of any matrix that is not dense.
        threshold: normalised value of the largest step that was too dear, in [0, 1]: all that is above it was kept; 0
            if nothing was refused.

    Raises:
        JaxmoeError: the budget does not reach for rank one, or spectra and shapes do not match or are not valid.

    Source:
        WeLore, arXiv 2407.11239, section 3.2; the budget in place of tables and the break-even are ours.

    Example:
        >>> steep, flat = [9.0, 3.0, 1.0, 0.0, 0.0, 0.0], [9.0, 8.0, 8.0, 7.0, 6.0, 0.0]
        >>> ranks, threshold = ranks_by_threshold([steep, flat], [(6, 6), (6, 6)], 50)
        >>> ranks.tolist(), round(threshold, 3)
        ([1, 6], 0.333)
    """
    flat, lengths = join("spectra", spectra)
    rows, columns, dearest = _sides(shapes, lengths)
    # The ranks that save, and one step more, to dense; a matrix that no rank saves has that one step only.
    dense = rows * columns
    saving = (dense - 1) // (rows + columns)
    first = np.minimum(dense, rows + columns)
    least = int(first.sum())
    check_budget(least, budget)

    owners = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    levels = np.arange(len(flat)) - np.repeat(starts, lengths)
    largest, smallest = flat[starts], flat[starts + lengths - 1]
    even = largest == smallest
    normalized = (flat - smallest[owners]) / np.where(even, 1.0, largest - smallest)[owners]
    normalized[even[owners]] = 1.0
    wanted = np.flatnonzero((levels >= 1) & (levels <= saving[owners]))
    order = np.argsort(-normalized[wanted], kind="stable")
    steps = wanted[order]
    last = levels[steps] == saving[owners[steps]]
    costs = np.where(last, (dense - saving * dearest)[owners[steps]], dearest[owners[steps]])
    bought = spend(owners[steps], costs, len(lengths), budget - least)

    ranks = 1 + bought.taken
    threshold = 0.0 if bought.refused is None else float(normalized[steps[bought.refused]])
    return np.where(ranks > saving, lengths, ranks), threshold


def _sides(shapes, lengths):
    """Return rows, columns and what a rank stores, `[matrix]` each."""
    found = np.asarray(list(shapes), np.int64).reshape(-1, 2)
    if len(found) != len(lengths):
        raise JaxmoeError(f"{len(lengths)} spectra with {len(found)} shapes: give one shape per spectrum")
    wrong = np.flatnonzero((found.min(1) != lengths) | (lengths < 1))
    if len(wrong):
        shown = ", ".join(f"{lengths[i]} values of {tuple(found[i].tolist())}" for i in wrong[:8])
        raise JaxmoeError(f"spectra that do not fit their shapes: {shown}; give min(m, n) values for (m, n)")
    return found[:, 0], found[:, 1], found.sum(1)
