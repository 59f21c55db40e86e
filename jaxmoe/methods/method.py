"""What a method is: a short recipe that says what may be stored and how it is fitted.

A method knows one MoE layer at a time. `targets` says what it replaces and `slot` which sizes a target can take; the
plan picks a level for every slot of the model under one budget; `fit` then finds the numbers of one target. Where a
size depends on the weights or on what was calibrated (ranks of single experts), the slot decides what they sum up to
and the fit shares it out. Everything else (reading, budgets, resuming, writing, reporting) is the same for all methods.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.allocation import Ladder
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Count, LayerShape, Term


class Slot(NamedTuple):
    """The sizes that one target can take: `at(level)` gives its abstract terms, `low <= level <= high`."""

    at: Callable[[int], tuple[Term, ...]]
    low: int
    high: int

    def ladder(self, size: Callable[[tuple[Term, ...]], int] | None = None, dense: int | None = None) -> Ladder:
        """Return the slot's sizes, counted on the abstract terms: those of both ends, and the line between them.

        Args:
            size: what terms amount to; None for their numbers.
            dense: what the target amounts to untouched; None for its numbers.
        """
        first, last = (
            count(terms).numbers if size is None else size(terms)
            for terms in (self.at(level) for level in (self.low, max(self.high, self.low + 1)))
        )
        step = -(-(last - first) // max(self.high - self.low, 1))
        whole = prod(self.at(self.low)[0].shape) if dense is None else dense
        return Ladder(whole, first - step * self.low, step, self.low, self.high)


def count(terms: tuple[Term, ...]) -> Count:
    """Count what several terms store together."""
    return sum((term.count() for term in terms), Count(0, 0))


DOWN_WEIGHT = 5.0
"""Weight of down where gate and up have 1 and nothing is known of what each costs, see `allocation.share`.

Noise of equal relative size costs 2 to 9 (mostly 3 to 4) times as many nats per token in down as in gate or up, on each
of three trained models: what is read from the residual stream has few strong directions, along which the trained
weights of gate and up lie and noise does not. Truncated SVD at 16.6 to 80 % removed on two of them agreed, and showed
that the advantage is gone where most is removed.
"""


def stacked_targets(shape: LayerShape) -> dict[str, float]:
    """Return gate and up as one target and down with its weight, as the improved settings have them.

    Example:
        >>> stacked_targets(LayerShape(experts=2, hidden=4, intermediate=3))
        {'gate_up': 1.0, 'down': 5.0}
    """
    return {"gate_up" if shape.gated else "up": 1.0, "down": DOWN_WEIGHT}


class Outcome(NamedTuple):
    """Something that the user should know about a unit: a typed record of the report, never only a log line.

    kind: what happened, such as `constant_weight` or `fell_back_to_svd`; target: where; detail: one sentence.
    """

    kind: str
    target: str
    detail: str


REORDERED = "reordered"
"""Kind of the outcome of a fit whose matrices do not stand for the original's entry by entry."""


def _unknown(name: str) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a target beside its own matrices; without calibration, nothing.

    Args:
        target: its name.
        moment: second moment of the inputs that weighs the errors, `[1|expert, in, in]`, shrunk and floored, the scale
            of an expert's its say; None for an unweighted error.
        counts: tokens that chose each expert, `[expert]`, or None.
        statistic: returns an array of `calibration.LayerStatistics` by name, None where it was not kept.
        weight: returns the matrices of a target of the same layer, `[expert, out, in]`, in float32.
        gated: whether the layer's experts have a gate.

    Example:
        >>> Evidence(target="down").statistic("fisher_down") is None
        True
    """

    target: str = ""
    moment: Any = None
    counts: np.ndarray | None = None
    statistic: Callable[[str], np.ndarray | None] = _unknown
    weight: Callable[[str], Any] = field(default=_unknown)
    gated: bool = True


class Fit(NamedTuple):
    """The result for one target.

    terms: the fitted terms in their storage dtype, of no more numbers than the template's; losses: the relative squared
    error of each step of an iterative fit, empty otherwise; outcomes: what the user should know.
    """

    terms: tuple[Term, ...]
    losses: np.ndarray = np.zeros(0, np.float32)
    outcomes: tuple[Outcome, ...] = ()


def no_requirements(settings: Any) -> Mapping[str, str]:
    """Return that a method needs nothing but weights."""
    return {}


class Method(NamedTuple):
    """A compression method.

    Args:
        name: as the command line spells it.
        summary: one line for the help text.
        settings: a frozen dataclass of keyword-only settings, validated in `__post_init__`.
        targets: `(shape, settings) -> {target: weight}`: what is replaced, and what raises each target's share of the
            budget where nothing is measured. Projections that no target covers stay dense.
        slot: `(target, shape, dtype, settings, kept, *, weighted) -> Slot`: the sizes of a target, all of equal steps,
            when it is to keep about a fraction `kept` of its numbers; `weighted`: second moments will weigh the errors.
        fit: `(weight, template, settings, *, evidence, key) -> Fit`: the numbers of one target, `[expert, out, in]`,
            shaped like the abstract terms of `template`; `evidence` is an `Evidence`.
        working_bytes: `(template) -> bytes` that a fit needs beside the float32 copy of its target.
        requires: `(settings) -> {statistic: mend}`: arrays of the statistics without which it cannot run, and what the
            user can do instead.
        allocation: the rule by which `--setting improved` shares the budget where the statistics allow it, see `plan`.
        falls_back_to_svd: whether `--setting improved` stores truncated SVD where that is closer at equal size.
        linear_slot: `(shape, dtype, settings) -> Slot`: the sizes of a linear map beside the routed experts, a
            `LinearShape`, of which `fit` gets the matrix as that of one expert; None where it works on experts alone.
    """

    name: str
    summary: str
    settings: type
    targets: Callable[..., Mapping[str, float]]
    slot: Callable[..., Slot]
    fit: Callable[..., Fit]
    working_bytes: Callable[[tuple[Any, ...]], int]
    requires: Callable[[Any], Mapping[str, str]] = no_requirements
    allocation: str = "uniform"
    falls_back_to_svd: bool = False
    linear_slot: Callable[..., Slot] | None = None

    kind = "factor"


ATTENTION_WEIGHT = 5.0
"""Weight of the maps of attention, in units of gate and up.

Weighted SVD of one kind of maps at a time, 20 to 60 % of it removed, costs 4 to 10 times as many nats per token and
removed number in attention as in the routed experts' gate and up, on each of three trained models with grouped heads;
down costs 3 to 5 times as many there.
"""


def linear_weight(name: str) -> float:
    """Return the weight of a linear map, or of a target of the routed experts, by its name.

    Example:
        >>> [linear_weight(name) for name in ("attention.query", "shared.up", "shared.down", "down")]
        [5.0, 1.0, 5.0, 5.0]
    """
    if name.startswith("attention."):
        return ATTENTION_WEIGHT
    return DOWN_WEIGHT if name.split(".")[-1] == "down" else 1.0


def needs_gradients(requires: Mapping[str, str]) -> bool:
    """Tell whether a method that requires these statistics needs the Fisher information.

    Example:
        >>> needs_gradients({"counts": "", "fisher_down": ""})
        True
    """
    return any(name.startswith("fisher") for name in requires)


def check_setting(setting: str) -> None:
    """Raise unless a setting is one of the two that every method has.

    Example:
        >>> check_setting("best")
        Traceback (most recent call last):
        ...
        jaxmoe.errors.JaxmoeError: setting 'best': give paper or improved
    """
    if setting not in ("paper", "improved"):
        raise JaxmoeError(f"setting {setting!r}: give paper or improved")
