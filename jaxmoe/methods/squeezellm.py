"""SqueezeLLM: codebooks that are learned where numbers lie and matter, and the most delicate numbers kept apart.

    W  =  table[q]  +  sparse            W  =  s table[q]      where rows are too short for tables of their own

setting="paper": a table for each row, by k-means weighted with the squared gradients; 0.05 % of a matrix, the numbers
of the largest squared gradients, and 0.4 %, the largest ones, are stored beside as they are. Tables are the exact
optimum, where the publication takes one start of Lloyd's iteration. setting="improved": weighted by the second moments
of the inputs, rounded with error feedback and refined, which gains more than the sparse part and costs no bits: there
is none. Rows shorter than `LONG` share one table for each matrix, under scales of groups: 16 * 2^b bits are too many
for each of them.
Source: SqueezeLLM, arXiv 2306.07629.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, Dense, Sparse, Term
from jaxmoe.factors.leaves import values
from jaxmoe.factors.store import Rounded, Scale, Store
from jaxmoe.methods.method import Evidence, Fit, Outcome
from jaxmoe.methods.quantising import QuantisingMethod, QuantisingSettings
from jaxmoe.methods.stored_terms import StoreOf, abstract_held, abstract_terms, hold, hold_terms
from jaxmoe.solvers.codebooks import delicate, learned_tables
from jaxmoe.solvers.error_feedback import error_feedback
from jaxmoe.solvers.refinement import TURNS, refine

LONG = 1024
"""Numbers from which on a row has a table of its own in the improved setting."""


@dataclass(frozen=True, kw_only=True)
class SqueezeLLMSettings(QuantisingSettings):
    """Settings of the method; None takes the setting's own default.

    Args:
        setting: "paper" or "improved".
        bits: of a code.
        bits_per: see `QuantisingSettings`.
        group: numbers under one scale where a matrix has one table (improved).
        scale: what holds these scales.
        sensitive: fraction of a matrix that is kept apart for its squared gradients: 0.0005 (paper), 0 (improved).
        large: fraction that is kept apart for its size: 0.004 (paper), 0 (improved).
        refine: turns in which codes, scales and tables are refined afterwards, where moments are known: 0 (paper), 3.

    Example:
        >>> SqueezeLLMSettings(setting="paper").large, SqueezeLLMSettings().large
        (0.004, 0.0)
    """

    group: int = 64
    scale: Scale = "quantised"
    sensitive: float | None = None
    large: float | None = None
    refine: int | None = None

    def __post_init__(self):
        super().__post_init__()
        paper = self.setting == "paper"
        for name, published in (("sensitive", 0.0005), ("large", 0.004)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, published if paper else 0.0)
            if not 0 <= getattr(self, name) < 0.5:
                raise JaxmoeError(f"{name}={getattr(self, name)}: give a fraction of 0 to less than 0.5")
        if self.refine is None:
            object.__setattr__(self, "refine", 0 if paper else TURNS)
        elif self.refine < 0:
            raise JaxmoeError(f"refine {self.refine}: give 0 turns or more")
        self.under_scales(self.bits or 2)

    def under_scales(self, bits: int) -> Store:
        """Return how numbers are held where a matrix has one table."""
        return Store(bits=bits, group=self.group, zero="none", table="matrix", scale=self.scale)

    def round(self, weight, store: Store, moment) -> Rounded:
        """Return the codes of tables learned under the moments' diagonals, with error feedback, and refined."""
        if moment is None:
            return learned_tables(weight, store)
        diagonal = jnp.diagonal(jnp.asarray(moment, jnp.float32), axis1=1, axis2=2)
        tables = learned_tables(weight, store, importance=diagonal)
        found = error_feedback(weight, store, moment=moment, order=True, given=tables)
        return refine(weight, found, store, moment, turns=self.refine) if self.refine else found


def requires(settings: SqueezeLLMSettings) -> Mapping[str, str]:
    """Return that the published weights are squared gradients."""
    mend = "calibrate with gradients, or take --setting improved"
    return {"fisher_up": mend, "fisher_down": mend} if settings.setting == "paper" else {}


def widths(settings: SqueezeLLMSettings) -> tuple[int, ...]:
    """Return the widths of codes; published are 3 and 4."""
    return (2, 3, 4) if settings.setting == "paper" else (2, 3, 4, 5, 6)


def stores(terms: tuple[Term, ...], settings: SqueezeLLMSettings) -> StoreOf:
    """Return how numbers of so many bits are held: with a table for each row of a long matrix, or for all."""
    whole = len(terms) == 1 and isinstance(terms[0], Dense)
    if whole and (settings.setting == "paper" or terms[0].shape[2] >= LONG):
        return lambda bits: Store(bits=bits, group=0, zero="none", table="row")
    return settings.under_scales


def kept_apart(terms: tuple[Term, ...], settings: SqueezeLLMSettings) -> tuple[int, int]:
    """Return how many numbers of a matrix are kept apart, for their gradients and their size; of factors, none."""
    if terms[1:] or not isinstance(terms[0], Dense):
        return 0, 0
    _, out, in_ = terms[0].shape
    return int((settings.sensitive or 0) * out * in_), int((settings.large or 0) * out * in_)


def abstract(terms: tuple[Term, ...], settings: SqueezeLLMSettings, bits: np.ndarray) -> tuple[Term, ...]:
    """Return the abstract terms as they will be held."""
    store, apart = stores(terms, settings), sum(kept_apart(terms, settings))
    if not apart:
        return abstract_terms(terms, bits, store)
    dense = cast(Dense, terms[0])
    shape, dtype = dense.shape, dense.weight.dtype
    return Dense(weight=abstract_held(shape, bits, store)), Sparse.abstract(shape, dtype, entries=shape[0] * apart)


def fit(
    terms: tuple[Term, ...], settings: SqueezeLLMSettings, bits: np.ndarray, *, evidence: Evidence, key=None
) -> Fit:
    """Return the terms in codes, and what is kept apart of matrices."""
    store, apart = stores(terms, settings), kept_apart(terms, settings)
    if settings.setting == "improved" and not sum(apart):
        return hold_terms(terms, bits, store, settings.round, evidence=evidence)
    if terms[1:] or not isinstance(terms[0], Dense):
        return hold_terms(terms, bits, store, lambda own, store, _: learned_tables(own, store), evidence=evidence)
    dense = terms[0]
    weight, fisher = values(dense.weight), _fisher(evidence)
    outcomes = ()
    if fisher is None or fisher.shape != weight.shape:
        fisher = None
        outcomes = (Outcome("no_fisher", "", "there are no squared gradients of it: its numbers are weighed alike"),)
    importance = jnp.ones(weight.shape) if fisher is None else jnp.asarray(fisher, jnp.float32)
    places = delicate(weight, importance, sensitive=apart[0], large=apart[1])
    experts, out, in_ = weight.shape
    rows = np.arange(experts)[:, None]
    # What is kept apart has no say in the tables.
    said = importance.reshape(experts, -1).at[rows, places].set(0).reshape(weight.shape)

    def tables(own, store, said):
        return learned_tables(own, store, importance=said)

    held = Dense(weight=hold(weight, bits, store, tables, said))
    if not sum(apart):
        return Fit((held,), outcomes=outcomes)
    rest = (weight - held.materialize()).reshape(experts, -1)[rows, places]
    sparse = Sparse(
        values=rest.reshape(1, -1).astype(dense.weight.dtype),
        indices=jnp.asarray(places, jnp.int32).reshape(1, -1),
        counts=jnp.full((1, experts), sum(apart), jnp.int32),
        experts=experts,
        out=out,
        in_=in_,
    )
    return Fit((held, sparse), outcomes=outcomes)


def _fisher(evidence: Evidence) -> np.ndarray | None:
    parts = [evidence.statistic(f"fisher_{projection}") for projection in TARGETS.get(evidence.target, ())]
    if not parts or any(part is None for part in parts):
        return None
    return np.concatenate([np.asarray(part) for part in parts], axis=1)


SQUEEZELLM = QuantisingMethod(
    "squeezellm",
    "codebooks by weighted k-means, with error feedback or outliers kept apart",
    SqueezeLLMSettings,
    widths,
    abstract,
    fit,
    requires=requires,
)
