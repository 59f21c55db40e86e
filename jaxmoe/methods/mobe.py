"""MoBE: the experts of a layer as mixtures of shared bases, each with a small factor of its own.

    W_e = A_e f(sum_j alpha_ej B_j)          A_e [P, r], B_j [r, Q], alpha_e one coefficient per base

setting="paper": gate and up apart with r = P (down stays), softmax mixing, silu, Adam; M is the size.
setting="improved": all three projections, gate and up stacked along their outputs over one set of bases; bases lie
along the longer axis of the matrices, so that what is shared is the longer factor (for down of fine-grained experts:
the hidden axis, transposed); variable projection, mixing of any sign through a wavelet; the coefficients are solved
once more for the bases as they are stored. Source: MoBE, arXiv 2508.05257; what differs from the authors' code is said
in `solvers/basis_learning.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import jax.numpy as jnp

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape, SharedBasis
from jaxmoe.factors.shared_basis import ACTIVATIONS
from jaxmoe.methods.method import Evidence, Fit, Method, Slot, check_setting, count, stacked_targets
from jaxmoe.methods.mixture import fit_mixture
from jaxmoe.solvers.basis_size import choose_bases, lies_transposed


@dataclass(frozen=True, kw_only=True)
class MoBESettings:
    """Settings of the method; None takes the setting's own default.

    Args:
        setting: "paper" or "improved".
        activation: the function between blend and coefficients; silu (paper) or wavelet (improved).
        steps: upper limit of optimiser steps; 50,000 (paper), or the length of the schedule, 3,000 (improved).
        patience: steps without a new best loss after which a fit stops; 2,000 (paper), or never (improved): the end of
            the schedule gains most.
        bases: number of bases M; the ratio then decides the rank. Chosen by `choose_bases` otherwise (improved).
        rank: rank r; the ratio then decides the number of bases. All rows otherwise (paper).
        groups: groups of experts that are fitted apart (paper), for very many experts.

    Example:
        >>> MoBESettings(setting="paper").steps
        50000
    """

    setting: str = "improved"
    activation: str | None = None
    steps: int | None = None
    patience: int | None = None
    bases: int | None = None
    rank: int | None = None
    groups: int = 1

    def __post_init__(self):
        check_setting(self.setting)
        defaults = {
            "paper": {"activation": "silu", "steps": 50_000, "patience": 2_000},
            "improved": {"activation": "wavelet", "steps": 3_000},
        }[self.setting]
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.activation not in ACTIVATIONS:
            raise JaxmoeError(f"activation {self.activation!r}: give one of {', '.join(ACTIVATIONS)}")
        low = {"steps": 0, "patience": 1, "bases": 1, "rank": 1, "groups": 1}
        if wrong := [f"{n}={v}" for n, least in low.items() if (v := getattr(self, n)) is not None and v < least]:
            raise JaxmoeError(f"{', '.join(wrong)}: too small")
        if self.bases is not None and self.rank is not None:
            raise JaxmoeError(f"bases={self.bases}, rank={self.rank}: give one of them, the ratio decides the other")


def targets(shape: LayerShape, settings: MoBESettings) -> Mapping[str, float]:
    """Return what is replaced: all but down (paper), or all, gate and up as one."""
    if settings.setting == "paper":
        return {name: 1.0 for name in shape.projections if name != "down"}
    return stacked_targets(shape)


def slot(target: str, shape: LayerShape, dtype, settings: MoBESettings, kept: float, *, weighted: bool = False) -> Slot:
    """Return a ladder of bases or ranks."""
    sizes = shape.of(target)
    experts, out, in_ = sizes
    rows, columns = min(out, in_), max(out, in_)

    def at(bases, rank):
        term = SharedBasis.abstract(
            sizes,
            dtype,
            bases=bases,
            rank=rank,
            activation=cast(str, settings.activation),
            transposed=lies_transposed(out, in_),
        )
        return (term,)

    most = experts * rows * columns - 1
    rank = settings.rank or (rows if settings.setting == "paper" and settings.bases is None else None)
    if rank is not None:
        if rank > rows:
            raise JaxmoeError(f"rank {rank}: the matrices of {target} are {out} x {in_}; give 1 to {rows}")
        high = min(experts, (most - experts * rows * rank) // (rank * columns + experts))
        return Slot(lambda bases: at(bases, rank), 1, max(1, high))
    # Inputs that lie along the rows are served by coefficients of their own.
    bases_weighted = weighted and not lies_transposed(out, in_)
    bases = settings.bases or choose_bases(sizes, kept, weighted=bases_weighted)
    if bases > experts:
        raise JaxmoeError(f"{bases} bases for {experts} experts: give 1 to {experts}")
    high = min(rows, (most - experts * bases) // (experts * rows + bases * columns))
    return Slot(lambda rank: at(bases, rank), 1, max(1, high))


def fit(weight, template, settings: MoBESettings, *, evidence: Evidence, key=None) -> Fit:
    """Return the mixture of one target, its coefficients solved for the bases as they are stored."""
    (abstract,) = template
    dtype = abstract.bases.dtype
    found = fit_mixture(
        jnp.swapaxes(weight, 1, 2) if abstract.transposed else weight,
        settings,
        bases=abstract.bases.shape[0],
        rank=abstract.rank,
        dtype=dtype,
        groups=settings.groups,
        key=key,
        # The inputs lie along the rows of a transposed fit.
        **{"row_moment" if abstract.transposed else "moment": evidence.moment},
    )
    term = SharedBasis(
        coefficients=found.coefficients.astype(dtype),
        bases=found.bases,
        mixing=found.mixing,
        activation=cast(str, settings.activation),
        transposed=abstract.transposed,
    )
    return Fit((term,), found.losses, found.outcomes)


def working_bytes(template) -> int:
    """Return the bytes of five copies of the parameters and of the blends with their gradients, in float32."""
    (term,) = template
    experts = term.shape[0]
    rank, columns = term.bases.shape[1:]
    rows = term.coefficients.shape[1]
    return 4 * (5 * count(template).numbers + 5 * experts * rank * columns + 2 * experts * rows * columns)


MOBE = Method(
    "mobe",
    "mixtures of shared bases",
    MoBESettings,
    targets,
    slot,
    fit,
    working_bytes,
    allocation="importance",
    falls_back_to_svd=True,
)
