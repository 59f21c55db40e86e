"""What an allocation rule is given: units, whole costs, bounds and a budget; read once, refused with every offender.

A unit is whatever takes ranks as a whole: a group of experts, one matrix, one layer. Budgets are numbers of parameters
and may exceed what float32 counts exactly, so all of them are int64.
"""

import numpy as np
from numpy.typing import ArrayLike

from jaxmoe.errors import JaxmoeError


def whole(name: str, values: ArrayLike, units: int, *, least: int) -> np.ndarray:
    """Return whole numbers as int64, one per unit; a scalar stands for all units.

    Args:
        name: of the argument, for the error.
        values: whole numbers, as integers or as floats without a fraction.
        units: how many there must be.
        least: the smallest allowed.

    Raises:
        JaxmoeError: if there are more or fewer, or one is not whole or too small.

    Example:
        >>> whole("costs", 3, 2, least=1).tolist()
        [3, 3]
    """
    given = np.asarray(values)
    if given.shape not in ((), (units,)):
        raise JaxmoeError(f"{name} has shape {given.shape}: give one number, or one for each of {units} units")
    given = np.broadcast_to(given, (units,))
    if given.dtype == object or not np.issubdtype(given.dtype, np.number):
        raise JaxmoeError(f"{name} is of type {given.dtype}: give whole numbers")
    with np.errstate(invalid="ignore"):
        found = given.astype(np.int64)
    _refuse(name, given, (found != given) | (found < least), f"give whole numbers of at least {least}")
    return found


def score(name: str, values: ArrayLike) -> np.ndarray:
    """Return scores as float64, one per unit.

    Raises:
        JaxmoeError: if they are not finite or below zero.

    Example:
        >>> score("importance", [1, 3]).tolist()
        [1.0, 3.0]
    """
    found = np.asarray(values, np.float64)
    if found.ndim != 1:
        raise JaxmoeError(f"{name} has shape {found.shape}: give one number for each unit")
    _refuse(name, found, ~np.isfinite(found) | (found < 0), "give finite numbers of at least 0")
    return found


def check_bounds(minimum: np.ndarray, caps: np.ndarray) -> None:
    """Raise if a unit must have more than it may have."""
    _refuse("minimum", minimum, minimum > caps, "give no more than the cap of the unit")


def check_budget(least: int, budget: int) -> None:
    """Raise if not even the least can be stored."""
    if least > budget:
        raise JaxmoeError(f"a budget of {budget} numbers is out of reach: the least is {least}")


def _refuse(name: str, values: np.ndarray, wrong: np.ndarray, mend: str) -> None:
    if wrong.any():
        where = np.flatnonzero(wrong)
        shown = ", ".join(f"{values[unit]} of unit {unit}" for unit in where[:8])
        more = f" and {len(where) - 8} more" if len(where) > 8 else ""
        raise JaxmoeError(f"{name}: {shown}{more}; {mend}")
