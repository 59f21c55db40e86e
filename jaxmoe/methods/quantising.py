"""What a quantising method is: it stores matrices, or the arrays of terms, in fewer bits.

It knows one target of one layer at a time: the terms that stand for its matrices, dense ones where no method replaced
them, and how many bits each expert's numbers get. Sizes follow from these alone, so that a budget in bytes is spent
exactly before anything runs.

A name with digits at its end, such as `gptq4`, is the method with so many bits everywhere; the bare name takes them
from its settings, or from a budget that chooses among its `widths` for every expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Term
from jaxmoe.methods.method import Evidence, Fit, check_setting, no_requirements

BITS = (2, 8)
"""The fewest and the most bits that a name or a setting may give."""

LEVELS = ("matrix", "expert", "layer", "model")
"""What may have bits of its own where a budget chooses."""


@dataclass(frozen=True, kw_only=True)
class QuantisingSettings:
    """What can be set of every method that holds numbers in few bits.

    Args:
        setting: "paper" (as published) or "improved".
        bits: of every number, 2 to 8; None where a budget chooses.
        bits_per: what has bits of its own where a budget chooses: every "matrix" of an expert, every "expert", every
            "layer" (all that vLLM can tell apart) or the "model" (all that transformers can); None for the setting's
            own, each matrix unless a publication says otherwise.

    Example:
        >>> QuantisingSettings(bits=9)
        Traceback (most recent call last):
        ...
        jaxmoe.errors.JaxmoeError: 9 bits: give 2 to 8
    """

    setting: str = "improved"
    bits: int | None = None
    bits_per: str | None = None

    OWN_BITS: ClassVar[Mapping[str, str]] = {"paper": "matrix", "improved": "matrix"}

    def __post_init__(self):
        check_setting(self.setting)
        if self.bits is not None and not BITS[0] <= self.bits <= BITS[1]:
            raise JaxmoeError(f"{self.bits} bits: give {BITS[0]} to {BITS[1]}")
        if self.bits_per is None:
            object.__setattr__(self, "bits_per", self.OWN_BITS[self.setting])
        if self.bits_per not in LEVELS:
            raise JaxmoeError(f"bits_per {self.bits_per!r}: give {', '.join(LEVELS)}")


def measured(settings: Any, evidence: Evidence, *, position: int) -> None:
    """Return no rule: measured losses decide who gets how many bits."""


def no_working(terms: tuple[Term, ...], settings: Any) -> int:
    """Return that a fit needs nothing beside its terms in float32."""
    return 0


class QuantisingMethod(NamedTuple):
    """A method that stores terms in fewer bits.

    Args:
        name: as the command line spells it.
        summary: one line for the help text.
        settings: a frozen dataclass of keyword-only settings, validated in `__post_init__`, such as
            `QuantisingSettings`; one without a field `bits` has a single width.
        widths: `(settings) -> (bits, ...)`: ascending, among which a budget chooses; of a single one all numbers are.
        abstract: `(terms, settings, bits) -> terms`: what becomes of a target's abstract terms, in exactly the bytes
            that it will take; `bits` is an int array `[expert]`.
        fit: `(terms, settings, bits, *, evidence, key) -> Fit`: the same of real terms; `evidence` is an `Evidence`
            whose `weight` gives the matrices that the terms stand for, as the source has them.
        requires: `(settings) -> {statistic: mend}` as for `Method`. A method that requires some is calibrated on what
            it finds, in a pass of its own; behind terms that were fitted on statistics, these serve it too.
        working_bytes: `(terms, settings) -> bytes` that a fit of some abstract terms needs beside their float32 copy.
        score: `(settings, evidence, *, position) -> [expert] or None`: who gets more bits of a budget, by the method's
            own rule: how much every expert of a target is worth, the `position` of the layer counted from 0; None where
            measured losses decide.
        fixed: the bits that the name ends in; None for a bare name.
    """

    name: str
    summary: str
    settings: type
    widths: Callable[[Any], tuple[int, ...]]
    abstract: Callable[[tuple[Term, ...], Any, np.ndarray], tuple[Term, ...]]
    fit: Callable[..., Fit]
    requires: Callable[[Any], Mapping[str, str]] = no_requirements
    working_bytes: Callable[[tuple[Term, ...], Any], int] = no_working
    score: Callable[..., np.ndarray | None] = measured
    fixed: int | None = None

    kind = "quantise"

    @property
    def takes_bits(self) -> bool:
        """Whether bits can be set, so that they may stand behind its name."""
        return any(own.name == "bits" for own in fields(self.settings))

    def at(self, bits: int) -> "QuantisingMethod":
        """Return the method with so many bits everywhere, which stand behind its name.

        Raises:
            JaxmoeError: the method has no such width.
        """
        self.settings(bits=bits)
        return self._replace(name=f"{self.name}{bits}", fixed=bits)


def chosen_bits(method: QuantisingMethod, settings: Any) -> int | None:
    """Return the bits that every number gets, None where a budget is to choose them.

    Args:
        method: its record.
        settings: an instance of `method.settings`.
    """
    widths = method.widths(settings)
    return widths[0] if len(widths) == 1 else getattr(settings, "bits", None)
