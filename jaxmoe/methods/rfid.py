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
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.allocation import floor_ranks, ranks_by_importance, water_fill
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Grouped, Hashed, LayerShape, Sparse, Term
from jaxmoe.factors.shared_basis import ACTIVATIONS
from jaxmoe.methods.descent_outcomes import descent_outcomes
from jaxmoe.methods.method import Evidence, Fit, Method, Outcome, Slot, check_setting, count, stacked_targets
from jaxmoe.scores import effective_rank, fused_importance
from jaxmoe.solvers.basis_learning import learn_basis
from jaxmoe.solvers.basis_size import choose_bases, lies_transposed
from jaxmoe.solvers.group_spectra import group_energies, group_spectra
from jaxmoe.solvers.mixture import Ragged, owners, solve_coefficients
from jaxmoe.solvers.residual import hashed_residual, largest_entries
from jaxmoe.solvers.variable_projection import variable_projection


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
            ("residual", ("hash", "topk", "none")),
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
    size = min(experts, settings.group or _group_size(sizes, kept, weighted and not transposed))
    groups = -(-experts // size)
    residual = _residual(sizes, dtype, settings, size)

    def at(total: int) -> tuple[Term, ...]:
        grouped = Grouped.abstract(
            sizes,
            dtype,
            total=total,
            size=size,
            activation=_activation(settings),
            transposed=transposed,
            mixed=settings.mixing == "padded",
            ordered=True,
        )
        return (grouped, *residual)

    fixed, step = count(at(0)).numbers, size * rows + columns
    high = min((dense - 1 - fixed) // step, groups * _cap(settings, size, rows, columns))
    return Slot(at, groups, max(groups, high))


def _activation(settings: RFIDSettings) -> str:
    return "identity" if settings.mixing == "none" else cast(str, settings.activation)


def _group_size(sizes, kept: float, weighted: bool) -> int:
    """Return the experts in a group that give as many groups as a mixture should have bases, or more."""
    return sizes[0] // choose_bases(sizes, kept, weighted=weighted)


def _cap(settings: RFIDSettings, size: int, rows: int, columns: int) -> int:
    """Return the largest rank of a group: beyond it, neither the stacked group nor the experts gain anything."""
    return (
        min(rows, columns)
        if settings.setting == "improved" and settings.mixing == "padded"
        else min(size * rows, columns)
    )


def _residual(sizes, dtype, settings: RFIDSettings, size: int) -> tuple[Term, ...]:
    experts, out, in_ = sizes
    buckets = round(settings.residual_fraction * size * out * in_)
    entries = int(settings.residual_fraction * experts * out * in_ - experts) // 2
    if settings.residual == "hash" and buckets:
        hashed = Hashed.abstract(
            sizes, dtype, buckets=buckets, size=size, balanced=bool(settings.balanced), ordered=True
        )
        return (hashed,)
    if settings.residual == "topk" and entries > 0:
        return (Sparse.abstract(sizes, dtype, entries=entries),)
    return ()


def fit(weight, template, settings: RFIDSettings, *, evidence: Evidence, key=None) -> Fit:
    """Return grouped bases and residual of one target."""
    abstract, *residual = template
    experts = abstract.shape[0]
    outcomes = []
    counts = np.zeros(experts) if evidence.counts is None else np.asarray(evidence.counts, np.float64)
    if not counts.any():
        outcomes.append(
            Outcome("uniform_frequency", "", "nothing was counted: all experts are taken to be as frequent")
        )
    order = np.argsort(-counts, kind="stable")
    # The published method takes nothing but counts from calibration: its objective weighs all directions alike.
    moment = None if settings.setting == "paper" else evidence.moment
    grouping = _Grouping(weight, abstract, order, moment, closed=settings.mixing == "none")
    ranks = _ranks(grouping, counts, count(template).numbers, settings, abstract, outcomes)
    learn = _mixed if settings.mixing == "padded" else _closed
    term, losses, more = learn(grouping, ranks, settings, abstract, key)
    outcomes += more
    if settings.residual != "none" and not residual:
        detail = f"{settings.residual_fraction} of the target is not one number a group: there is no residual"
        outcomes.append(Outcome("no_residual", "", detail))
    terms = (term, *(_fitted_residual(left, weight, term, order, abstract.size, key) for left in residual))
    return Fit(terms, losses, tuple(outcomes))


class _Grouping:
    """A target's matrices in the orientation and order of its fit.

    matrices: `[expert, row, column]`, sorted by frequency; moment: along the columns, row_moment: along the rows,
    sorted alike; owner: the group of each place; even: whether groups are the blocks of a fit of equal ranks; energies:
    of the stacked groups, weighted where a moment is known; bases: the groups' own of every rank, where closed.
    """

    def __init__(self, weight, abstract: Grouped, order, moment, *, closed: bool = False):
        self.order, self.size = order, abstract.size
        self.groups = abstract.ranks.shape[1]
        self.owner = np.arange(len(order)) // abstract.size
        self.even = np.array_equal(self.owner, owners(len(order), self.groups))
        self.members = np.bincount(self.owner, minlength=self.groups)
        matrices = jnp.swapaxes(weight, 1, 2) if abstract.transposed else weight
        self.matrices = jnp.asarray(matrices, jnp.float32)[order]
        own = None if moment is None else jnp.asarray(moment, jnp.float32)
        own = own if own is None or len(own) == 1 else own[order]
        self.moment, self.row_moment = (None, own) if abstract.transposed else (own, None)
        options = {"size": self.size, "moment": self.moment, "row_moment": self.row_moment}
        spectra = group_spectra(self.matrices, **options) if closed else None
        self.bases = None if spectra is None else spectra.bases
        energies = group_energies(self.matrices, **options) if spectra is None else spectra.energies
        self.energies = np.asarray(energies, np.float64)


def _ranks(
    grouping: _Grouping, counts, numbers: int, settings: RFIDSettings, abstract: Grouped, outcomes
) -> np.ndarray:
    """Return the ranks of the groups: floors of Eq. 13, in proportion to importance, or by weighted spectra."""
    total, rows, columns = abstract.bases.shape[0], abstract.coefficients.shape[1], abstract.bases.shape[1]
    cap = _cap(settings, grouping.size, rows, columns)
    costs = grouping.members * rows + columns
    step = grouping.size * rows + columns
    budget = total * step
    caps = np.minimum(cap, grouping.members * rows)
    weighted = grouping.moment is not None or grouping.row_moment is not None
    if weighted and settings.xi is None and not settings.paper_exact:
        return water_fill(grouping.energies, costs, budget, minimum=1, caps=caps)[0]
    frequency = np.bincount(grouping.owner, counts[grouping.order], minlength=grouping.groups)
    # Whole ranks keep up to one step less than what was asked for.
    kept = (numbers + step) / grouping.matrices.size
    xi = settings.xi if settings.xi is not None else (0.8 if kept >= 0.7 else 0.7)
    importance = np.asarray(
        fused_importance(effective_rank(jnp.asarray(grouping.energies)), jnp.asarray(frequency), xi), np.float64
    )
    if not settings.paper_exact:
        return ranks_by_importance(importance, costs, caps, budget, minimum=1)
    ranks = floor_ranks(importance / importance.sum(), total)
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
    return ranks


_solve = jax.jit(solve_coefficients, static_argnames=("activation", "refinements"))


def _mixed(grouping: _Grouping, ranks, settings: RFIDSettings, abstract: Grouped, key):
    """Learn bases that are blended over all groups."""
    dtype = abstract.bases.dtype
    ragged = Ragged(jnp.asarray(ranks, jnp.int32), jnp.asarray(grouping.owner, jnp.int32))
    if len(set(ranks)) == 1 and ranks[0] <= grouping.matrices.shape[1] and grouping.even:
        # MoBE on the sorted experts, bit for bit, without masks.
        ragged = None
    activation = cast(str, settings.activation)
    learn = learn_basis if settings.setting == "paper" else variable_projection
    found = learn(
        grouping.matrices,
        bases=grouping.groups,
        rank=int(ranks.max()),
        activation=activation,
        steps=cast(int, settings.steps),
        patience=settings.patience,
        moment=grouping.moment,
        row_moment=grouping.row_moment,
        ragged=ragged,
        key=key,
    )
    bases, mixing, coefficients = found.bases.astype(dtype), found.mixing.astype(dtype), found.coefficients
    if settings.setting == "improved":
        coefficients = _solve(
            grouping.matrices, bases, mixing, activation=activation, moment=grouping.moment, ragged=ragged
        )
    term = _packed(grouping, ranks, coefficients, bases, mixing, abstract)
    return term, np.asarray(found.losses)[: int(found.steps)], descent_outcomes(found)


def _closed(grouping: _Grouping, ranks, settings: RFIDSettings, abstract: Grouped, key):
    """Return the best bases of single groups, by Eckart and Young."""
    assert grouping.bases is not None
    bases = grouping.bases[:, : int(ranks.max())].astype(abstract.bases.dtype)
    matrices, owner, groups = grouping.matrices, grouping.owner, grouping.groups
    moment, refinements = grouping.moment, 2
    if moment is None or len(moment) == 1:
        # All experts of a group have the same problem: their rows are solved for together.
        filled = jnp.pad(matrices, ((0, groups * grouping.size - len(matrices)), (0, 0), (0, 0)))
        matrices, owner = filled.reshape(groups, -1, matrices.shape[2]), np.arange(groups)
    if moment is None and grouping.row_moment is None:
        # Orthonormal but for their rounding: there is nothing to refine.
        refinements = 0
    ragged = Ragged(jnp.asarray(ranks, jnp.int32), jnp.asarray(owner, jnp.int32))
    coefficients = _solve(
        matrices,
        bases,
        jax.nn.one_hot(owner, groups),
        activation="identity",
        moment=moment,
        ragged=ragged,
        refinements=refinements,
    )
    coefficients = coefficients.reshape(-1, grouping.matrices.shape[1], bases.shape[1])[: len(grouping.matrices)]
    return _packed(grouping, ranks, coefficients, bases, None, abstract), np.zeros(0, np.float32), []


def _packed(grouping: _Grouping, ranks, coefficients, bases, mixing, abstract: Grouped) -> Grouped:
    back = np.argsort(grouping.order)
    return Grouped.build(
        coefficients[back],
        bases,
        ranks,
        order=grouping.order,
        mixing=None if mixing is None else mixing[back],
        size=grouping.size,
        activation=abstract.activation,
        transposed=abstract.transposed,
        dtype=abstract.bases.dtype,
    )


@partial(jax.jit, static_argnames=("size", "buckets", "balanced"))
def _hash(weight, term, order, seed, *, size, buckets, balanced):
    left = jnp.asarray(weight, jnp.float32) - term.materialize()
    return hashed_residual(left, buckets=buckets, order=order, size=size, seed=seed, balanced=balanced)


@partial(jax.jit, static_argnames="entries")
def _largest(weight, term, *, entries):
    return largest_entries(jnp.asarray(weight, jnp.float32) - term.materialize(), entries=entries)


def _fitted_residual(abstract, weight, term: Grouped, order, size: int, key) -> Term:
    if isinstance(abstract, Sparse):
        values, indices, counts = _largest(weight, term, entries=abstract.values.shape[1])
        experts, out, in_ = abstract.shape
        return Sparse(
            values=values.astype(abstract.values.dtype),
            indices=indices,
            counts=counts,
            experts=experts,
            out=out,
            in_=in_,
        )
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1)) if key is not None else 0
    options = {"size": size, "buckets": abstract.buckets, "balanced": abstract.balanced}
    values = _hash(weight, term, jnp.asarray(order, jnp.int32), seed, **options)
    return Hashed(
        values=values.astype(abstract.values.dtype),
        seed=np.full((1, 1), seed, np.int32),
        order=np.asarray(order, np.int32)[None],
        experts=abstract.experts,
        out=abstract.out,
        in_=abstract.in_,
        size=abstract.size,
        buckets=abstract.buckets,
        last=abstract.last,
        balanced=abstract.balanced,
    )


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
