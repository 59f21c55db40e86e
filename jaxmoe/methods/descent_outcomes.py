"""What the user should know of how the bases of a mixture were found."""

import numpy as np

from jaxmoe.methods.method import Outcome
from jaxmoe.solvers.mixture import BasisFit
from jaxmoe.solvers.variable_projection import RISE, ROUNDING


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
