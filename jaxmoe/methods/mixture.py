"""The mixture of bases as the recipes that store one fit it, and what the user should know of how it was found.

    W_e ~ A_e f(sum_j alpha_ej B_j)

setting="paper" is the published descent (`learn_basis`). setting="improved" is variable projection, after which the
coefficients are solved once more for the bases and the mixing as they are stored: A absorbs their rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.methods.method import Outcome
from jaxmoe.solvers.basis_learning import learn_basis
from jaxmoe.solvers.mixture import BasisFit, Ragged, solve_coefficients
from jaxmoe.solvers.variable_projection import RISE, ROUNDING, variable_projection


class Mixture(NamedTuple):
    """A fitted mixture.

    coefficients: A, in float32; bases, mixing: B and alpha in their storage dtype; losses: the relative squared error
    before each step that was taken; outcomes: what the user should know.
    """

    coefficients: Float[Array, "expert row rank"]
    bases: Float[Array, "base rank column"]
    mixing: Float[Array, "expert base"]
    losses: Float[np.ndarray, " step"]
    outcomes: tuple[Outcome, ...]


def fit_mixture(
    matrices: Float[AnyArray, "expert row column"],
    settings: Any,
    *,
    bases: int,
    rank: int,
    dtype: Any,
    moment: Float[AnyArray, "_ column column"] | None = None,
    row_moment: Float[AnyArray, "_ row row"] | None = None,
    groups: int = 1,
    ragged: Ragged | None = None,
    solve: Callable[..., Array] = solve_coefficients,
    key: Array | None = None,
) -> Mixture:
    """Fit a mixture by the descent of a recipe's setting.

    Args:
        matrices: the experts' matrices in the orientation of the fit.
        settings: the recipe's, with `setting`, `activation`, `steps` and `patience`.
        bases: number of bases.
        rank: of the bases; the largest where they are unequal.
        dtype: that bases and mixing are stored in.
        moment: along the columns, `[1|expert, column, column]`.
        row_moment: along the rows, `[1|expert, row, row]`.
        groups: of experts that are fitted apart ("paper" only).
        ragged: unequal ranks of the bases.
        solve: `solve_coefficients`, or a compiled form of it, whose last bits differ.
        key: of the random starts.
    """
    options = {
        "bases": bases,
        "rank": rank,
        "activation": settings.activation,
        "steps": settings.steps,
        "patience": settings.patience,
        "moment": moment,
        "row_moment": row_moment,
        "ragged": ragged,
        "key": key,
    }
    paper = settings.setting == "paper"
    found = learn_basis(matrices, groups=groups, **options) if paper else variable_projection(matrices, **options)
    stored, mixing, coefficients = found.bases.astype(dtype), found.mixing.astype(dtype), found.coefficients
    if not paper:
        coefficients = solve(matrices, stored, mixing, activation=settings.activation, moment=moment, ragged=ragged)
    losses = np.asarray(found.losses)[: int(found.steps)]
    return Mixture(coefficients, stored, mixing, losses, tuple(descent_outcomes(found)))


def descent_outcomes(found: BasisFit) -> list[Outcome]:
    """Return what happened on the way to a mixture, in the order of its happening.

    Kinds: `not_fitted` (no steps), `diverged` (the last loss was not finite), `lower_rate` (long steps rose above
    the best in the trial), `descent_returned` (they did so later on, each time the best state went on with half the
    rate), `ended_above_best` (the last state is far worse than the best, which is kept).

    Example:
        >>> import jaxmoe
        >>> fit = jaxmoe.variable_projection(np.ones((2, 2, 3)), bases=1, rank=1, steps=0)
        >>> [outcome.kind for outcome in descent_outcomes(fit)]
        ['not_fitted']
    """
    steps = int(found.steps)
    if not found.losses.size:
        return [Outcome("not_fitted", "", "no optimiser step was asked for: this is the start")]
    outcomes = []
    if bool(found.diverged):
        detail = f"the loss was not finite after {steps} steps; the best state before is kept"
        outcomes.append(Outcome("diverged", "", detail))
    asked, chosen, last = (float(rate) for rate in found.rates)
    if chosen < asked:
        detail = f"in the trial the loss rose far above its best at rate {asked:.3g}: the rate became {chosen:.3g}"
        outcomes.append(Outcome("lower_rate", "", detail))
    if returns := int(found.returns):
        detail = f"the loss rose far above its best {returns} times: each time the descent went back to its best state "
        detail += f"with half the rate, at last {last:.3g} in place of {chosen:.3g}"
        outcomes.append(Outcome("descent_returned", "", detail))
    losses = np.asarray(found.losses)[:steps]
    best = losses.min(initial=np.inf, where=np.isfinite(losses))
    if RISE * max(best, ROUNDING) < losses[-1] < np.inf:
        ended, kept = np.sqrt((losses[-1], best))
        detail = f"the last of {steps} steps had the relative error {ended:.4f}; the best, {kept:.4f}, is kept"
        outcomes.append(Outcome("ended_above_best", "", detail))
    return outcomes
