"""Rounding to few bits: to the nearest code (rtn), with zeros that forgive outliers (hqq), with error feedback (gptq).

    rtn     every number to the nearest code of its group
    hqq     the same, with the real zero of each group fitted under a norm that forgives outliers; needs no text
    gptq    column by column, each column's error taken up by those behind it, under the second moment of the inputs

setting="paper": as published, half-precision scales without a search. setting="improved": groups of 64 and integer
zeros (real ones for hqq), scales searched, weighted by what each expert sees where that is known (router-weighted,
starved experts leaning on all others); gptq's scales in 8 bits, its columns in falling order of what they are worth,
and its codes and scales refined.
Sources: rtn as the baseline of GPTQ; Badri and Shaji 2023 (HQQ); Frantar et al. 2022, arXiv 2210.17323 (GPTQ).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Term
from jaxmoe.factors.store import Rounded, Scale, Store, Zero
from jaxmoe.methods.method import Evidence, Fit, Outcome
from jaxmoe.methods.pruning import needs
from jaxmoe.methods.quantising import QuantisingMethod, QuantisingSettings
from jaxmoe.methods.stored_terms import abstract_terms, hold_terms
from jaxmoe.solvers.error_feedback import error_feedback
from jaxmoe.solvers.half_quadratic import hqq
from jaxmoe.solvers.refinement import TURNS, refine
from jaxmoe.solvers.rounding import round_nearest

WIDTHS = (2, 3, 4, 5, 6)
"""Bits among which a budget chooses: 8 are never worth their bytes while others have fewer than 6."""


@dataclass(frozen=True, kw_only=True)
class RoundingSettings(QuantisingSettings, ABC):
    """What can be set of every method of rounding; None takes the setting's own default.

    Args:
        group: numbers along a row that share a scale, 0 for the whole row.
        zero: of the codes: "none" (symmetric), "integer" or "real".
        scale: what holds the scales: "bfloat16", "float16", "float32", "quantised" (8 bits) or "exponent".

    Example:
        >>> RTNSettings(setting="paper").group, RTNSettings().store(4)
        (128, Store(bits=4, group=64, zero='integer', table=None, scale='bfloat16'))
    """

    group: int | None = None
    zero: Zero | None = None
    scale: Scale | None = None

    DEFAULTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self):
        super().__post_init__()
        for name, value in self.DEFAULTS[self.setting].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self.store(self.bits or WIDTHS[0])

    def store(self, bits: int) -> Store:
        """Return how numbers of so many bits are held."""
        assert self.group is not None
        assert self.zero is not None
        assert self.scale is not None
        return Store(bits=bits, group=self.group, zero=self.zero, scale=self.scale)

    @abstractmethod
    def round(self, weight: AnyArray, store: Store, moment: AnyArray | None) -> Rounded:
        """Round matrices whose inputs have some second moment, None where it is not known."""


@dataclass(frozen=True, kw_only=True)
class RTNSettings(RoundingSettings):
    """Settings of rounding to nearest.

    Args:
        search: whether each group's scale is searched for.
    """

    search: bool | None = None

    DEFAULTS: ClassVar = {
        "paper": {"group": 128, "zero": "integer", "scale": "float16", "search": False},
        "improved": {"group": 64, "zero": "integer", "scale": "bfloat16", "search": True},
    }

    def round(self, weight: AnyArray, store: Store, moment: AnyArray | None) -> Rounded:
        """Round matrices; the diagonal of the moment of their inputs weighs the search."""
        importance = None if moment is None else np.diagonal(moment, axis1=1, axis2=2)
        return round_nearest(weight, store, search=bool(self.search), importance=importance)


@dataclass(frozen=True, kw_only=True)
class HQQSettings(RoundingSettings):
    """Settings of HQQ: zeros are real ones."""

    DEFAULTS: ClassVar = {
        "paper": {"group": 64, "zero": "real", "scale": "float16"},
        "improved": {"group": 64, "zero": "real", "scale": "bfloat16"},
    }

    def __post_init__(self):
        super().__post_init__()
        if self.zero != "real":
            raise JaxmoeError(f"zero {self.zero!r}: hqq fits real zeros, take rtn for others")

    def round(self, weight: AnyArray, store: Store, moment: AnyArray | None) -> Rounded:
        """Round matrices; the inputs do not matter."""
        return hqq(weight, store, released=self.setting == "paper")


@dataclass(frozen=True, kw_only=True)
class GPTQSettings(RoundingSettings):
    """Settings of rounding with error feedback.

    Args:
        search: whether each group's scale is searched for.
        damping: added to the diagonal of the moment, in units of its mean.
        order: whether columns go in falling order of what their inputs are worth, under the scales of their own groups.
        refine: turns in which codes, scales and zeros are refined afterwards.
    """

    search: bool | None = None
    damping: float = 0.01
    order: bool | None = None
    refine: int | None = None

    DEFAULTS: ClassVar = {
        "paper": {"group": 128, "zero": "integer", "scale": "float16", "search": False, "order": False, "refine": 0},
        "improved": {
            "group": 64,
            "zero": "integer",
            "scale": "quantised",
            "search": True,
            "order": True,
            "refine": TURNS,
        },
    }

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.damping < np.inf:
            raise JaxmoeError(f"damping {self.damping}: give 0 or more")
        if self.refine is not None and self.refine < 0:
            raise JaxmoeError(f"refine {self.refine}: give 0 turns or more")

    def round(self, weight: AnyArray, store: Store, moment: AnyArray | None) -> Rounded:
        """Round matrices; to the nearest code where nothing is known of their inputs."""
        if moment is None:
            return round_nearest(weight, store, search=bool(self.search))
        found = error_feedback(
            weight, store, moment=moment, damping=self.damping, order=bool(self.order), search=bool(self.search)
        )
        if not self.refine:
            return found
        return refine(weight, found, store, moment, turns=self.refine, damping=self.damping)


def widths(settings: RoundingSettings) -> tuple[int, ...]:
    """Return the bits among which a budget chooses."""
    return WIDTHS


def abstract(terms: tuple[Term, ...], settings: RoundingSettings, bits: np.ndarray) -> tuple[Term, ...]:
    """Return the abstract terms as they will be held."""
    return abstract_terms(terms, bits, settings.store)


def fit(terms: tuple[Term, ...], settings: RoundingSettings, bits: np.ndarray, *, evidence: Evidence, key=None) -> Fit:
    """Return the terms with their arrays held in few bits."""
    return hold_terms(terms, bits, settings.store, settings.round, evidence=evidence)


def fit_gptq(terms, settings: GPTQSettings, bits: np.ndarray, *, evidence: Evidence, key=None) -> Fit:
    """Return the terms with their arrays held in few bits; without a moment they are rounded to nearest."""
    found = fit(terms, settings, bits, evidence=evidence)
    if evidence.moment is not None:
        return found
    detail = "nothing is known of its inputs: its numbers are rounded to the nearest codes, without error feedback"
    return found._replace(outcomes=(*found.outcomes, Outcome("unweighted", "", detail)))


RTN = QuantisingMethod("rtn", "round to the nearest code", RTNSettings, widths, abstract, fit)
HQQ = QuantisingMethod("hqq", "round with zeros that forgive outliers", HQQSettings, widths, abstract, fit)
GPTQ = QuantisingMethod(
    "gptq",
    "round with error feedback under the second moment of the inputs",
    GPTQSettings,
    widths,
    abstract,
    fit_gptq,
    needs("intermediate_moments"),
)
