"""RFID-MoE: groups of experts with a basis each, ranks by routing frequency and information density, a residual.

    W_e = A_e f( sum_j alpha_ej B_j )  +  R_e            e in group g uses the first r_g rows of the blend, B_j has r_j
    W_e = A_e B_g  +  R_e                                with mixing="none", in closed form

Experts are sorted by how often the router picks them and cut into groups. The rank of a group is in proportion to

    C_g = xi eff_g + (1 - xi) freq_g        eff: effective rank of the stacked group, freq: routing counts, each / sum

and a fraction of the numbers goes to the residual: values under a hash (`Hashed`), or the largest entries (`Sparse`).

setting="paper": gate and up apart, groups of four, silu, Adam; ranks are Eq. 13's floors (`paper_exact`), 3 % hashed
i.i.d. into buckets; calibration gives it counts alone. setting="improved": all projections, gate and up stacked, groups
as large as mixtures want them, variable projection through a wavelet under the weighted objective, ranks that spend the
budget exactly, by weighted spectra where second moments are known, and no residual: at equal size more rank takes more
of the error (README).
Source: RFID-MoE, arXiv 2602.09316; where the text leaves things open, the readings are: full mixing over all groups'
bases, singular values in A, and the residual in closed form after the fit, its optimum.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxmoe.allocation import floor_ranks, ranks_by_importance, water_fill
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Grouped, LayerShape, Term
from jaxmoe.factors.shared_basis import ACTIVATIONS
from jaxmoe.methods.method import Evidence, Fit, Method, Outcome, Slot, check_setting, count, stacked_targets
from jaxmoe.methods.mixture import fit_mixture
from jaxmoe.methods.residual import RESIDUALS, abstract_residual, fit_residual
from jaxmoe.scores import effective_rank, fused_importance
from jaxmoe.solvers.basis_size import choose_bases, lies_transposed
from jaxmoe.solvers.grouped_bases import Grouping, closed_form, compiled_solve, group


@dataclass(frozen=True, kw_only=True)
class RFIDSettings:
    """Settings of the method; None takes the setting's own default.

    Args:
        setting: "paper" or "improved".
        group: experts in a group, the last may have fewer; 4 (paper), or as many as give the bases that mixtures want.
        xi: weight of the effective rank against the routing frequency, in [0, 1]; 0.8 where up to 30 % of the target is
            removed, as nearly as whole ranks allow, else 0.7.
        mixing: "padded" blends the bases of all groups, "none" gives every group its own, in closed form.
        residual: "hash" (paper), "topk" (largest entries, their places counted) or "none" (improved).
        residual_fraction: of the target's numbers that the residual may store.
        balanced: whether the hash fills its buckets evenly; False (paper), True (improved).
        paper_exact: whether ranks are the floors of Eq. 13, which lose up to a rank a group; True (paper). With False
            the improved setting takes the ranks of weighted spectra where moments are known and no xi is given.
        activation: f of the blend; silu (paper), wavelet (improved).
        steps: upper limit of optimiser steps; 50,000 (paper), 3,000 (improved).
        patience: steps without a new best loss after which a fit stops; 2,000 (paper), or never.

    Example:
        >>> RFIDSettings(setting="paper").group, RFIDSettings(residual="topk").residual_fraction
        (4, 0.03)
    """

    setting: str = "improved"
    group: int | None = None
    xi: float | None = None
    mixing: str = "padded"
    residual: str | None = None
    residual_fraction: float = 0.03
    balanced: bool | None = None
    paper_exact: bool | None = None
    activation: str | None = None
    steps: int | None = None
    patience: int | None = None

    def __post_init__(self):
        check_setting(self.setting)
        paper = self.setting == "paper"
        for name, published, ours in (
            ("group", 4, None),
            ("residual", "hash", "none"),
            ("balanced", False, True),
            ("paper_exact", True, False),
            ("activation", "silu", "wavelet"),
            ("steps", 50_000, 3_000),
            ("patience", 2_000, None),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, published if paper else ours)
        faults = []
        for name, known in (
            ("mixing", ("padded", "none")),
            ("residual", RESIDUALS),
            ("activation", tuple(n for n, f in ACTIVATIONS.items() if f(0.0) == 0)),
        ):
            if getattr(self, name) not in known:
                faults.append(f"{name} {getattr(self, name)!r}: give one of {', '.join(known)}")
        for name, low, high in (("xi", 0, 1), ("residual_fraction", 0, 0.5)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                faults.append(f"{name}={value}: give a fraction of {low} to {high}")
        for name, least in (("group", 1), ("steps", 0), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                faults.append(f"{name}={value}: give at least {least}")
        if faults:
            raise JaxmoeError("; ".join(faults))


def targets(shape: LayerShape, settings: RFIDSettings) -> Mapping[str, float]:
    """Return what is replaced: all but down (paper), or all, gate and up as one."""
    if settings.setting == "paper":
        return {name: 1.0 for name in shape.projections if name != "down"}
    return stacked_targets(shape)


def requires(settings: RFIDSettings) -> Mapping[str, str]:
    """Return that the published method counts how experts are routed."""
    if settings.setting == "improved":
        return {}
    return {"counts": "give --text or --statistics, or take --setting improved, which can do without"}


def slot(target: str, shape: LayerShape, dtype, settings: RFIDSettings, kept: float, *, weighted: bool = False) -> Slot:
    """Return a ladder of the sum of the groups' ranks."""
    sizes = shape.of(target)
    experts, out, in_ = sizes
    dense = experts * out * in_
    transposed = settings.setting == "improved" and lies_transposed(out, in_)
    rows, columns = (in_, out) if transposed else (out, in_)
    # As many groups as a mixture should have bases, or more.
    size = settings.group or experts // choose_bases(sizes, kept, weighted=weighted and not transposed)
    size = min(experts, size)
    groups, mixed = -(-experts // size), settings.mixing == "padded"
    residual = abstract_residual(
        sizes,
        dtype,
        kind=cast(str, settings.residual),
        fraction=settings.residual_fraction,
        size=size,
        balanced=bool(settings.balanced),
    )

    def at(total: int) -> tuple[Term, ...]:
        grouped = Grouped.abstract(
            sizes,
            dtype,
            total=total,
            size=size,
            activation=cast(str, settings.activation) if mixed else "identity",
            transposed=transposed,
            mixed=mixed,
            ordered=True,
        )
        return (grouped, *residual)

    fixed, step = count(at(0)).numbers, size * rows + columns
    high = min((dense - 1 - fixed) // step, groups * _cap(settings, size, rows, columns))
    return Slot(at, groups, max(groups, high))


def _cap(settings: RFIDSettings, size: int, rows: int, columns: int) -> int:
    """Return the largest rank of a group: beyond it, neither the stacked group nor the experts gain anything."""
    return (
        min(rows, columns)
        if settings.setting == "improved" and settings.mixing == "padded"
        else min(size * rows, columns)
    )


def fit(weight, template, settings: RFIDSettings, *, evidence: Evidence, key=None) -> Fit:
    """Return grouped bases and residual of one target."""
    abstract, *residual = template
    outcomes = []
    counts = np.zeros(abstract.shape[0]) if evidence.counts is None else np.asarray(evidence.counts, np.float64)
    if not counts.any():
        detail = "nothing was counted: all experts are taken to be as frequent"
        outcomes.append(Outcome("uniform_frequency", "", detail))
    closed = settings.mixing == "none"
    grouping = group(
        weight,
        np.argsort(-counts, kind="stable"),
        size=abstract.size,
        # The published method takes nothing but counts from calibration: its objective is unweighted.
        moment=None if settings.setting == "paper" else evidence.moment,
        transposed=abstract.transposed,
        with_bases=closed,
    )
    ranks, capped = choose_ranks(grouping, counts, template, settings)
    outcomes += capped
    mixing, losses, dtype = None, np.zeros(0, np.float32), abstract.bases.dtype
    if closed:
        coefficients, bases = closed_form(grouping, ranks, dtype=dtype)
    else:
        coefficients, bases, mixing, losses, events = fit_mixture(
            grouping.matrices,
            settings,
            bases=grouping.groups,
            rank=int(ranks.max()),
            dtype=dtype,
            moment=grouping.moment,
            row_moment=grouping.row_moment,
            ragged=grouping.ragged(ranks),
            solve=compiled_solve,
            key=key,
        )
        outcomes += events
    back = np.argsort(grouping.order)
    term = Grouped.build(
        coefficients[back],
        bases,
        ranks,
        order=grouping.order,
        mixing=None if mixing is None else mixing[back],
        size=abstract.size,
        activation=abstract.activation,
        transposed=abstract.transposed,
        dtype=dtype,
    )
    if settings.residual != "none" and not residual:
        detail = f"{settings.residual_fraction} of the target is not one number a group: there is no residual"
        outcomes.append(Outcome("no_residual", "", detail))
    rest = tuple(fit_residual(left, weight, term, order=grouping.order, key=key) for left in residual)
    return Fit((term, *rest), losses, tuple(outcomes))


def choose_ranks(
    grouping: Grouping, counts: np.ndarray, template: tuple[Term, ...], settings: RFIDSettings
) -> tuple[np.ndarray, list[Outcome]]:
    """Return the ranks of the groups: floors of Eq. 13, in proportion to importance, or by weighted spectra.

    Args:
        grouping: the groups of a target.
        counts: tokens that chose each expert, by expert number.
        template: the target's abstract terms, of which the first is a `Grouped`: its ranks' sum is the budget.
        settings: the method's.

    Returns:
        `[group]`, and what the user should know.

    Raises:
        JaxmoeError: Eq. 13 with its rank of at least one for every group exceeds the budget.
    """
    abstract = cast(Grouped, template[0])
    total, rows, columns = abstract.bases.shape[0], abstract.coefficients.shape[1], abstract.bases.shape[1]
    costs = grouping.members * rows + columns
    step = grouping.size * rows + columns
    budget = total * step
    caps = np.minimum(_cap(settings, grouping.size, rows, columns), grouping.members * rows)
    weighted = grouping.moment is not None or grouping.row_moment is not None
    if weighted and settings.xi is None and not settings.paper_exact:
        return water_fill(grouping.energies, costs, budget, minimum=1, caps=caps)[0], []
    frequency = np.bincount(grouping.owner, counts[grouping.order], minlength=grouping.groups)
    # Whole ranks keep up to one step less than what was asked for.
    kept = (count(template).numbers + step) / grouping.matrices.size
    xi = settings.xi if settings.xi is not None else (0.8 if kept >= 0.7 else 0.7)
    density = effective_rank(jnp.asarray(grouping.energies))
    importance = np.asarray(fused_importance(density, jnp.asarray(frequency), xi), np.float64)
    if not settings.paper_exact:
        return ranks_by_importance(importance, costs, caps, budget, minimum=1), []
    ranks, outcomes = floor_ranks(importance / importance.sum(), total), []
    if (above := ranks > caps).any():
        named = ", ".join(f"{rank} of group {group}" for group, rank in enumerate(ranks) if above[group])
        detail = (
            f"Eq. 13 gives ranks beyond the matrices' ({named}): capped, {(ranks - caps)[above].sum()} ranks unspent"
        )
        outcomes.append(Outcome("capped_ranks", "", detail))
        ranks = np.minimum(ranks, caps)
    if costs @ ranks > budget:
        raise JaxmoeError(
            f"Eq. 13 with at least one rank a group stores {costs @ ranks} numbers of {budget}: "
            "set paper_exact=false, or remove less"
        )
    return ranks, outcomes


def working_bytes(template) -> int:
    """Return the bytes of five copies of the parameters, of the blends and of the groups' Gram matrices."""
    grouped = template[0]
    experts, out, in_ = grouped.shape
    groups, columns = grouped.ranks.shape[1], grouped.bases.shape[1]
    rank = min(grouped.widest, 2 * grouped.rank)
    blends = 5 * count((grouped,)).numbers + 5 * experts * rank * columns + 2 * experts * out * in_
    return 4 * max(blends, experts * out * in_ + 3 * groups * columns**2)


RFID = Method(
    "rfid",
    "groups by routing frequency, ranks by information density, residual",
    RFIDSettings,
    targets,
    slot,
    fit,
    working_bytes,
    requires,
    allocation="importance",
    falls_back_to_svd=True,
)
