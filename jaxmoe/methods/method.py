"""What a method is: a short recipe that says what may be stored and how it is fitted.

A method knows one MoE layer at a time. `slots` says which targets it replaces and which sizes they can take; the plan
picks a level for every slot of the model under one budget; `fit` then finds the numbers of one target. Everything else
(reading, budgets, resuming, writing, reporting) is the same for all methods.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.allocation import Ladder
from jaxmoe.factors import Term


class Slot(NamedTuple):
    """One target of one layer and the sizes that it can take: `at(level)` is the abstract term, `low <= level <= high`.

    `weight` raises the target's share of the budget, see `allocation.share`.
    """

    target: str
    at: Callable[[int], Term]
    low: int
    high: int
    weight: float = 1.0

    def ladder(self) -> Ladder:
        """Return the slot's sizes in numbers, counted on the abstract terms."""
        shape = self.at(self.low).shape
        first, second = (self.at(level).count().numbers for level in (self.low, self.low + 1))
        step = second - first
        dense = shape[0] * shape[1] * shape[2]
        return Ladder(dense, first - step * self.low, step, self.low, self.high, self.weight)


DOWN_WEIGHT = 5.0
"""Weight of down where gate and up have 1.

Noise of equal relative size costs 2 to 9 (mostly 3 to 4) times as many nats per token in down as in gate or up, on each
of three trained models: what is read from the residual stream has few strong directions, along which the trained
weights of gate and up lie and noise does not. Truncated SVD at 16.6 to 80 % removed on two of them agreed, and showed
that the advantage is gone where most is removed.
"""


class Outcome(NamedTuple):
    """Something that the user should know about a unit: a typed record of the report, never only a log line.

    kind: what happened, such as `constant_weight` or `fell_back_to_svd`; target: where; detail: one sentence.
    """

    kind: str
    target: str
    detail: str


class Fit(NamedTuple):
    """The result for one target.

    term: the fitted term in its storage dtype; losses: the relative squared error of each step of an iterative fit,
    empty otherwise; outcomes: what the user should know.
    """

    term: Term
    losses: np.ndarray
    outcomes: tuple[Outcome, ...] = ()


class Method(NamedTuple):
    """A compression method.

    Args:
        name: as the command line spells it.
        summary: one line for the help text.
        settings: a frozen dataclass of keyword-only settings, validated in `__post_init__`.
        slots: `(shape, dtype, settings, kept, *, weighted) -> slots`: which targets are replaced and which sizes they
            can take when targets of weight 1 are to keep a fraction `kept` of their numbers; neither targets nor
            weights may depend on it. Targets that are not named stay dense. `weighted` says whether second moments will
            weigh the errors.
        fit: `(weight, template, settings, *, moment, key) -> Fit`: the numbers of one target, `[expert, out, in]`,
            shaped like the abstract term `template`; `moment` is the second moment of the inputs `[1|expert, in, in]`
            or None. Its scale is an expert's say where experts share something.
        working_bytes: `(template) -> bytes` that a fit needs beside the float32 copy of its target.
    """

    name: str
    summary: str
    settings: type
    slots: Callable[..., tuple[Slot, ...]]
    fit: Callable[..., Fit]
    working_bytes: Callable[[Any], int]
