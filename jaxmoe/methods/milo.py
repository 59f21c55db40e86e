"""MiLo: a rounded matrix and, in its own few bits, a low-rank compensator of what rounding took from it.

    W_e  =  Q_e  +  L_e R_e        in turn: Q_e rounds W_e - L_e R_e, and L_e R_e is the closest to W_e - Q_e

The mean rank of a target's compensators is a setting, so that their bytes are known beforehand; they are shared out
among its experts. setting="paper": HQQ in groups of 64 and up to 20 rounds, which ignore the inputs; the factors are
rounded to 3 bits after them; ranks in proportion to 2^kurtosis. setting="improved": error feedback under the second
moments, the closest factors under the same, rounded to 4 bits in every round, of which each expert keeps its best one,
refined at last; ranks where they take the most off the error.

Where the same bytes, spent on wider codes, would have lost less, the report says so: on the models that were measured
that is everywhere from 2 to 4 bits, so the improved rank is a small one.
Source: MiLo, arXiv 2504.02658. Differences: rank 16 is published as a mean over experts; the best round is kept instead
of the last; ranks end where factors store as much as the matrix; the factors' scale is that of max |x|.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxmoe.allocation import ranks_by_importance, water_fill
from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Dense, Term
from jaxmoe.factors.leaves import values
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.methods.compensators import abstract_compensators, packed_compensators, refitted_factors, rounded_factors
from jaxmoe.methods.low_rank import expert_factors
from jaxmoe.methods.method import Evidence, Fit, Outcome
from jaxmoe.methods.quantising import QuantisingMethod, QuantisingSettings
from jaxmoe.methods.stored_terms import abstract_held, hold
from jaxmoe.methods.svd import break_even
from jaxmoe.solvers.compensation import compensate, excess_kurtosis, published_ranks, weighted_errors
from jaxmoe.solvers.error_feedback import error_feedback
from jaxmoe.solvers.half_quadratic import hqq
from jaxmoe.solvers.refinement import refine
from jaxmoe.solvers.rounding import round_nearest

TOLERANCE = 1e-4
"""By how much the mean error must fall for another round, as published."""


@dataclass(frozen=True, kw_only=True)
class MiLoSettings(QuantisingSettings):
    """Settings of the method; None takes the setting's own default.

    Args:
        setting: "paper" or "improved".
        bits: of the matrices' codes.
        bits_per: see `QuantisingSettings`.
        rank: of a compensator, in the mean over a target's experts, as far as it saves something: 16 (paper), 2
            (improved).
        rounds: that follow the first one: 20 (paper), 3 (improved).
        factor_bits: of the compensators' numbers: 3 (paper), 4 (improved).

    Example:
        >>> MiLoSettings(setting="paper").rank, MiLoSettings().factor_bits
        (16, 4)
    """

    rank: int | None = None
    rounds: int | None = None
    factor_bits: int | None = None

    def __post_init__(self):
        super().__post_init__()
        paper = self.setting == "paper"
        for name, published, ours in (("rank", 16, 2), ("rounds", 20, 3), ("factor_bits", 3, 4)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, published if paper else ours)
        assert self.rank is not None
        assert self.rounds is not None
        if self.rank < 1 or self.rounds < 0:
            raise JaxmoeError(
                f"rank {self.rank} in {self.rounds} rounds: give a rank of at least 1, and 0 or more rounds"
            )
        _ = self.factors

    def store(self, bits: int) -> Store:
        """Return how the matrices are held."""
        if self.setting == "paper":
            return Store(bits=bits, zero="real", scale="float16")
        return Store(bits=bits, scale="quantised")

    @property
    def factors(self) -> Store:
        """How rows of the factors are held."""
        return Store(bits=self.factor_bits or 4, group=64 if self.setting == "paper" else 32, zero="none")


def widths(settings: MiLoSettings) -> tuple[int, ...]:
    """Return the widths of codes; published is 3."""
    return (2, 3, 4)


def _total(settings: MiLoSettings, shape: tuple[int, int, int]) -> int:
    """Return the sum of the ranks of a target's compensators."""
    return shape[0] * min(settings.rank or 0, break_even(shape))


def abstract(terms: tuple[Term, ...], settings: MiLoSettings, bits: np.ndarray) -> tuple[Term, ...]:
    """Return the abstract terms as they will be held.

    Raises:
        JaxmoeError: the terms are not matrices.
    """
    shape = _matrices(terms).shape
    compensators = abstract_compensators(shape, _total(settings, shape), break_even(shape), settings.factors)
    return Dense(weight=abstract_held(shape, bits, settings.store)), compensators


def _matrices(terms: tuple[Term, ...]) -> Dense:
    if len(terms) == 1 and isinstance(terms[0], Dense):
        return terms[0]
    found = " + ".join(term.kind for term in terms)
    raise JaxmoeError(f"milo compensates for the rounding of matrices, not of {found}: behind it take gptq, or rtn")


def fit(terms: tuple[Term, ...], settings: MiLoSettings, bits: np.ndarray, *, evidence: Evidence, key=None) -> Fit:
    """Return the rounded matrices and their compensators."""
    weight, paper = values(_matrices(terms).weight), settings.setting == "paper"
    experts, out, in_ = weight.shape
    moment = None if paper else evidence.moment
    base = _published if paper else _fed_back
    plain = weight - hold(weight, bits, settings.store, base, moment).values()
    ranks = _ranks(settings, weight, plain, moment)
    factors = {}

    def compensated(own, store: Store, seen) -> Rounded:
        members = np.flatnonzero(bits == store.bits)
        result = compensate(
            own,
            store,
            ranks=ranks[members],
            rounds=settings.rounds or 0,
            rounding=lambda left_over: base(left_over, store, seen),
            moment=seen,
            hold=None if paper else partial(refitted_factors, store=settings.factors, moment=seen),
            tolerance=TOLERANCE,
        )
        found = rounded_factors(result.factors, settings.factors) if paper else result.factors
        for place, expert in enumerate(members.tolist()):
            factors[expert] = jax.tree.map(lambda x, place=place: x[place : place + 1], found.stored)
        if seen is None:
            return result.rounded
        product = jnp.matmul(found.left, found.right, precision=lax.Precision.HIGHEST)
        return refine(own - product, result.rounded, store, seen)

    dense = Dense(weight=hold(weight, bits, settings.store, compensated, moment))
    grouped = packed_compensators([factors[expert] for expert in range(experts)], ranks, (out, in_), settings.factors)
    rest = weight - dense.materialize() - grouped.materialize()
    # Of 8 bits there are no wider ones: nothing is said of them.
    more = weight - hold(weight, np.minimum(bits + 1, 8), settings.store, base, moment).values()
    outcomes = _outcomes(
        8 * grouped.count().bytes / weight.size, *(weighted_errors(x, moment) for x in (rest, plain, more))
    )
    return Fit((dense, grouped), outcomes=outcomes)


def _published(weight, store: Store, moment) -> Rounded:
    return hqq(weight, store)


def _fed_back(weight, store: Store, moment) -> Rounded:
    if moment is None:
        return round_nearest(weight, store, search=True)
    return error_feedback(weight, store, moment=moment, order=True)


def _ranks(settings: MiLoSettings, weight: Array, rest: Array, moment: AnyArray | None) -> np.ndarray:
    """Return the ranks of the experts' compensators, by kurtosis (paper) or where they take the most off the error."""
    experts, out, in_ = weight.shape
    shape = experts, out, in_
    total, most = _total(settings, shape), break_even(shape)
    if settings.setting == "paper":
        return ranks_by_importance(published_ranks(excess_kurtosis(weight)), 1, most, total, minimum=0)
    return water_fill(np.asarray(expert_factors(rest, moment, 1).energies), 1, total, caps=most)[0]


def _outcomes(took: float, rest: np.ndarray, plain: np.ndarray, more: np.ndarray) -> tuple[Outcome, ...]:
    """Return that wider codes would have lost less at the same bytes, if they would: squared errors fall by powers."""
    with_factors, without, wider = (float(np.sum(own**2)) for own in (rest, plain, more))
    if not 0 < wider < without:
        return ()
    instead = without * (wider / without) ** took
    if instead >= with_factors:
        return ()
    detail = (
        f"its compensators take {took:.2f} bits a number and {1 - with_factors / without:.0%} off the squared error; as"
        f" many bits more in the codes would take off about {1 - instead / without:.0%}: gptq under a budget in bytes"
        " spends them so"
    )
    return (Outcome("bits_instead", "", detail),)


MILO = QuantisingMethod(
    "milo",
    "round, and compensate with low rank for what that took",
    MiLoSettings,
    widths,
    abstract,
    fit,
)
