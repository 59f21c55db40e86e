"""D²-MoE: one base for all experts of a layer and a low-rank deviation for each.

    W_e  =  base  +  L_e R_e          base = merge of the experts, L_e R_e the truncated SVD of W_e - base under C_e

setting="paper": gate, up and down apart; the base is the average weighted by the Fisher information, pruned by input
channels, half of `sparsity` in storage and half anew in every batch; deviations are whitened by each expert's own sums
of x x', one rank for all. setting="improved": gate and up as one target; moments shrunk for starved experts and weighed
by the router; the base that is closest under them (RegMean), intermediate neurons pruned in storage only; ranks go to
the experts whose deviations need them; and no base where factors of the experts themselves are closer at equal size,
which the report says, with the share of their energy that the base explains.

Whitening needs no inverse and no Cholesky factor: a deviation is projected on leading eigenvectors of D C D'. The base
is applied once for every token. Masking in a batch saves no storage and counts as none, unlike in the publication.
Source: D²-MoE, arXiv 2502.17298; the released code weighs by Fisher information times routing counts
(`merge="fisher_freq"`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.allocation import water_fill
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, Grouped, LayerShape, LowRank, Shared, Term
from jaxmoe.methods.method import Evidence, Fit, Method, Outcome, Slot, check_setting, count, stacked_targets
from jaxmoe.solvers.merging import MergeMethod, merge, regmean, shared_energy, ties
from jaxmoe.solvers.mixture import squared_norms
from jaxmoe.solvers.shared_right import shared_right
from jaxmoe.solvers.weighted_svd import weighted_svd

MERGES = ("fisher", "fisher_freq", "freq", "mean", "regmean", "ties")
DELTAS = ("whitened", "asvd", "plain")

UNSEEN = 1e-6
"""What published moments get in every direction, in units of the mean eigenvalue.

The publication has none: with fewer tokens than inputs, ranks beyond their number would then serve nothing at all, and
not even the full rank would give an expert back. Where tokens have been it changes nothing that is worth storing.
"""


@dataclass(frozen=True, kw_only=True)
class D2MoESettings:
    """Settings of the method; None takes the setting's own default.

    Args:
        setting: "paper" or "improved".
        merge: how the base is made: "fisher" (paper), "fisher_freq" (released code), "freq", "mean", "regmean"
            (improved, which without second moments takes "freq", and without counts "mean"), "ties".
        delta: what the deviations are fitted under: "whitened" by the second moments, "asvd" by the roots of their
            diagonals, "plain".
        sparsity: of the base, in [0, 1).
        dynamic: part of it that is masked anew in every batch instead of removed, in [0, 1]; 0.5 (paper), 0 (improved).
        mode: what is pruned: "column" (inputs of each base, paper) or "neuron" (one set of intermediate channels,
            improved).
        trim: fraction of the experts, the least routed, that go without a deviation.
        share_v: whether all experts' deviations have one right factor.
        base: "always" (paper), or "auto": only where it helps (improved).

    Example:
        >>> D2MoESettings(setting="paper").merge, D2MoESettings().mode
        ('fisher', 'neuron')
    """

    setting: str = "improved"
    merge: str | None = None
    delta: str = "whitened"
    sparsity: float = 0.1
    dynamic: float | None = None
    mode: str | None = None
    trim: float = 0.0
    share_v: bool = False
    base: str | None = None

    def __post_init__(self):
        check_setting(self.setting)
        paper = self.setting == "paper"
        for name, published, ours in (
            ("merge", "fisher", "regmean"),
            ("dynamic", 0.5, 0.0),
            ("mode", "column", "neuron"),
            ("base", "always", "auto"),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, published if paper else ours)
        faults = []
        for name, known in (
            ("merge", MERGES),
            ("delta", DELTAS),
            ("mode", ("column", "neuron")),
            ("base", ("always", "auto")),
        ):
            if getattr(self, name) not in known:
                faults.append(f"{name} {getattr(self, name)!r}: give one of {', '.join(known)}")
        for name in ("sparsity", "dynamic", "trim"):
            if not 0 <= getattr(self, name) <= 1 or (name != "dynamic" and getattr(self, name) == 1):
                faults.append(f"{name}={getattr(self, name)}: give a fraction of 0 to 1")
        if faults:
            raise JaxmoeError("; ".join(faults))

    @property
    def removed(self) -> float:
        """The fraction of the base's channels that storage goes without."""
        return self.sparsity * (1 - float(self.dynamic or 0.0))

    @property
    def masked(self) -> float:
        """The fraction of the base's channels that every batch masks."""
        return self.sparsity * float(self.dynamic or 0.0)


def targets(shape: LayerShape, settings: D2MoESettings) -> Mapping[str, float]:
    """Return what is replaced: every projection, or gate and up as one."""
    return dict.fromkeys(shape.projections, 1.0) if settings.setting == "paper" else stacked_targets(shape)


def requires(settings: D2MoESettings) -> Mapping[str, str]:
    """Return what the merge and the whitening of the published method need."""
    needed = {}
    if settings.merge in ("fisher", "fisher_freq"):
        mend = "calibrate with --gradients sequence, or --set merge=freq"
        needed |= {"fisher_up": mend, "fisher_down": mend}
    if settings.merge in ("freq", "fisher_freq"):
        needed["counts"] = "give --text or --statistics, or --set merge=mean"
    if settings.setting == "paper" and settings.delta != "plain":
        mend = "calibrate with --moments expert or weighted, or --set delta=plain"
        needed |= {"input_moments": mend, "intermediate_moments": mend}
    return needed


def slot(
    target: str, shape: LayerShape, dtype, settings: D2MoESettings, kept: float, *, weighted: bool = False
) -> Slot:
    """Return a ladder of ranks: of every expert (paper), of one shared factor, or of all experts together."""
    sizes = shape.of(target)
    experts, out, in_ = sizes
    base = _abstract_base(sizes, target, dtype, settings)
    if settings.share_v:
        at = lambda rank: (base, Grouped.abstract(sizes, dtype, total=rank, size=experts))  # noqa: E731
        low, step, most = 1, experts * out + in_, in_
    elif settings.setting == "paper" and not settings.trim:
        at = lambda rank: (base, LowRank.abstract(sizes, dtype, rank=rank))  # noqa: E731
        low, step, most = 1, experts * (out + in_), min(out, in_)
    else:
        at = lambda total: (base, Grouped.abstract(sizes, dtype, total=total))  # noqa: E731
        low, step = experts - _trimmed(settings, experts), out + in_
        most = low * min(out, in_)
    fixed = count(at(low)).numbers - low * step
    high = min(most, (experts * out * in_ - 1 - fixed) // step)
    return Slot(at, low, max(low, high))


def _trimmed(settings: D2MoESettings, experts: int) -> int:
    return _floor(settings.trim * experts)


def _floor(number: float) -> int:
    """Return the whole part of a product of decimals, whose rounding must not cost one: 0.29 of 100 are 29."""
    return int(number + 1e-9)


def _abstract_base(sizes, target: str, dtype, settings: D2MoESettings) -> Shared:
    _, out, in_ = sizes
    axis, parts, channels = _axis(target, out, in_, settings)
    cut = _floor(settings.removed * channels)
    masked = _floor(settings.masked * in_) if axis == "in" else 0
    return Shared.abstract(sizes, dtype, kept=channels - cut if cut else None, axis=axis, parts=parts, dynamic=masked)


def _axis(target: str, out: int, in_: int, settings: D2MoESettings) -> tuple[str, int, int]:
    """Return the axis of the base that is pruned, in how many parts, and its channels."""
    if settings.mode == "column" or target == "down":
        return "in", 1, in_
    parts = len(TARGETS[target])
    return "out", parts, out // parts


def fit(weight, template, settings: D2MoESettings, *, evidence: Evidence, key=None) -> Fit:
    """Return base and deviations of one target."""
    abstract, deltas = template
    experts = weight.shape[0]
    outcomes = []
    weight = jnp.asarray(weight, jnp.float32)
    moment = _moment(settings, evidence, outcomes)
    base = _base(weight, settings, evidence, evidence.target, outcomes)
    stored = base.astype(abstract.weight.dtype)
    shared = Shared.build(
        stored,
        experts=experts,
        kept=_kept_channels(weight, stored, abstract, settings, evidence),
        axis=abstract.axis,
        parts=abstract.parts,
        dynamic=abstract.dynamic,
    )
    # The deviation sees the base as it is stored; in the publication, before it is pruned.
    seen = jnp.asarray(stored, jnp.float32) if settings.setting == "paper" else shared.materialize(slice(1))[0]
    least = _least_routed(settings, evidence, experts)
    terms = (shared, _deviations(weight - seen, deltas, moment, settings, least))
    if settings.base == "auto":
        terms = _or_no_base(weight, terms, template, moment, seen, outcomes)
    has_base = terms[0] is shared
    if has_base and len(least):
        detail = f"experts {', '.join(map(str, sorted(least.tolist())))}, the least routed, go without a deviation"
        outcomes.append(Outcome("trimmed", "", detail))
    if has_base and abstract.dynamic:
        outcomes.append(_as_published(weight, template, abstract.dynamic))
    return Fit(terms, outcomes=tuple(outcomes))


def _moment(settings: D2MoESettings, evidence: Evidence, outcomes):
    """Return what the deviations are weighed by, `[1|expert, in(, in)]`, or None."""
    if settings.delta == "plain":
        return None
    if settings.setting == "paper":
        name = "intermediate_moments" if evidence.target == "down" else "input_moments"
        moment = evidence.statistic(name)
        moment = _scaled(moment, evidence.counts, outcomes)
    else:
        moment = evidence.moment
        if moment is None:
            outcomes.append(Outcome("unweighted", "", "no second moments are known: deviations are plain SVDs"))
    if moment is None or settings.delta == "whitened":
        return moment
    # ASVD scales inputs by their size to the power of 1/2; the root mean square stands for the mean of |x|.
    return np.sqrt(np.maximum(np.diagonal(np.asarray(moment), axis1=1, axis2=2), 0.0))


def _scaled(moment, counts, outcomes):
    """Return each expert's own moment per token; the pooled one for experts that no token chose."""
    moment, counts = np.array(moment, np.float64), np.asarray(counts, np.float64)
    if not counts.sum() > 0:
        outcomes.append(Outcome("unweighted", "", "no calibration token reached this layer: deviations are plain SVDs"))
        return None
    # In place: these are the largest arrays of the whole method.
    if not counts.all():
        moment[counts == 0] = moment.sum(0) / counts.sum()
    moment /= np.maximum(counts, 1)[:, None, None]
    levels = np.trace(moment, axis1=1, axis2=2) / moment.shape[1]
    diagonal = np.einsum("eii->ei", moment)
    diagonal += UNSEEN * np.where(levels > 0, levels, 1.0)[:, None]
    return moment


def _base(weight, settings: D2MoESettings, evidence: Evidence, target: str, outcomes) -> jax.Array:
    """Return the merged matrices of a target, `[out, in]`."""
    counts, method = evidence.counts, settings.merge
    counts = counts if counts is not None and np.sum(counts) > 0 else None
    if method == "regmean":
        moment = evidence.moment if target == evidence.target else None
        if moment is not None:
            return _regmean(weight, jnp.asarray(moment, jnp.float32))
        method = "mean" if counts is None else "freq"
    if method == "ties":
        return jax.jit(ties)(weight)
    fisher = None
    if method in ("fisher", "fisher_freq"):
        fisher = np.concatenate([np.asarray(evidence.statistic(f"fisher_{p}")) for p in TARGETS[target]], axis=1)
        if not fisher.any():
            detail = "the Fisher information is zero everywhere: the base is the average by routed tokens"
            outcomes.append(Outcome("no_fisher", "", detail))
        elif missed := int((fisher.sum(0) == 0).sum()):
            detail = f"{missed} entries have no Fisher information: there the average by routed tokens stands in"
            outcomes.append(Outcome("partial_fisher", "", detail))
        # Squared gradients may lie below what float32 holds; their scale does not matter.
        fisher = jnp.asarray(fisher / (fisher.max() or 1.0), jnp.float32)
    if counts is None and method in ("freq", "fisher_freq"):
        outcomes.append(
            Outcome("unweighted_merge", "", "no calibration token reached this layer: the base is the mean")
        )
        method = "mean" if method == "freq" else "fisher"
    return merge(
        weight, method=cast(MergeMethod, method), fisher=fisher, counts=None if counts is None else jnp.asarray(counts)
    )


@jax.jit
def _regmean(weight, moment):
    return regmean(weight, jnp.broadcast_to(moment, (weight.shape[0], *moment.shape[1:])), ridge=0.0)


def _kept_channels(weight, base, abstract: Shared, settings: D2MoESettings, evidence: Evidence) -> np.ndarray | None:
    """Return the channels of the base that are stored: those of the largest norm times activation; None for all."""
    if abstract.kept is None:
        return None
    side = "intermediate" if evidence.target == "down" or settings.mode == "neuron" else "input"
    if settings.mode == "neuron":
        down = weight if evidence.target == "down" else jnp.asarray(evidence.weight("down"), jnp.float32)
        # Only the fit of down knows the moment of its inputs: without it every target chooses the same neurons.
        base = _base(down, settings, replace(evidence, moment=None), "down", []).astype(base.dtype)
    moments = evidence.statistic(f"{side}_moments")
    size = np.linalg.norm(np.asarray(base, np.float64), axis=0)
    if moments is not None:
        size = size * np.sqrt(np.maximum(np.einsum("eii->i", np.asarray(moments)), 0.0))
    return np.sort(np.argsort(-size, kind="stable")[: abstract.kept.shape[1]])


def _least_routed(settings: D2MoESettings, evidence: Evidence, experts: int) -> np.ndarray:
    counts = np.zeros(experts) if evidence.counts is None else np.asarray(evidence.counts)
    return np.argsort(counts, kind="stable")[: _trimmed(settings, experts)]


@partial(jax.jit, static_argnames="rank")
def _project(delta, moment, rank):
    return weighted_svd(delta, rank=rank, column_moment=moment)


def _factors(delta, moment, rank: int):
    """Return factors and energies, in float64 where a moment weighs them."""
    if moment is None:
        return _project(delta, None, rank)
    with jax.enable_x64(True):
        found = _project(jnp.asarray(delta, jnp.float64), jnp.asarray(moment, jnp.float64), rank)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)


def _deviations(delta, abstract: Term, moment, settings: D2MoESettings, least: np.ndarray) -> Term:
    """Return the deviations in the form of the template."""
    experts, out, in_ = abstract.shape
    if isinstance(abstract, LowRank):
        found = _factors(delta, moment, abstract.rank)
        left, right = _balanced(found.left, found.right, found.energies)
        dtype = abstract.left.dtype
        return LowRank(left=left.astype(dtype), right=right.astype(dtype))
    assert isinstance(abstract, Grouped)
    total, dtype = abstract.bases.shape[0], abstract.bases.dtype
    if abstract.size > 1:
        left, right = shared_right(delta, rank=total, moment=moment)
        left = left.at[least].set(0.0)
        return Grouped.build(left, right[None], [total], size=experts, dtype=dtype)
    rank = min(out, in_)
    found = _factors(delta, moment, rank)
    minimum = np.ones(experts, np.int64)
    caps = np.full(experts, rank)
    minimum[least], caps[least] = 0, 0
    if settings.setting == "paper":
        # One rank for all who have any.
        energies = np.where(caps[:, None] > 0, np.arange(rank, 0, -1.0), 0.0)
    else:
        energies = np.asarray(found.energies, np.float64)
    ranks, _ = water_fill(energies, 1, total, minimum=minimum, caps=caps)
    left, right = _balanced(found.left, found.right, found.energies)
    return Grouped.build(left, right, ranks, dtype=dtype)


def _balanced(left, right, energies):
    """Share the singular values between both factors, which storage in few bits likes."""
    rank = left.shape[-1]
    size = jnp.sqrt(jnp.sqrt(jnp.maximum(energies[:, :rank], 0.0)))
    scale = jnp.where(size > 0, size, 1.0)
    return left * scale[:, None, :], right / scale[:, :, None]


def _or_no_base(weight, terms, template, moment, base, outcomes) -> tuple[Term, ...]:
    """Return the terms, or factors of the experts themselves where these are closer at equal size."""
    experts, out, in_ = weight.shape
    dtype, size = terms[0].weight.dtype, count(template)
    # Ranks of single experts are whole numbers of four bytes, which the template may not have.
    spare = min(size.numbers - experts, (size.bytes - 4 * experts) // np.dtype(dtype).itemsize)
    found = _factors(weight, moment, min(out, in_))
    ranks, _ = water_fill(np.asarray(found.energies, np.float64), 1, spare // (out + in_), minimum=0)
    left, right = _balanced(found.left, found.right, found.energies)
    others = (Grouped.build(left, right, ranks, dtype=dtype),)
    whole = None
    if moment is not None:
        whole = jnp.asarray(moment if np.ndim(moment) == 3 else jax.vmap(jnp.diag)(moment), jnp.float32)

    def lost(chosen: tuple[Term, ...]) -> float:
        error = weight - sum(term.materialize() for term in chosen)
        return float(jnp.sum(squared_norms(error, whole)))

    share = float(shared_energy(weight, base, whole))
    words = f"the base explains {share:.4f} of the experts' energy (1 / experts: {1 / experts:.4f})"
    if lost(terms) <= lost(others):
        outcomes.append(Outcome("base", "", f"{words}: kept"))
        return terms
    outcomes.append(Outcome("no_base", "", f"{words}: factors of the experts themselves are closer at equal size"))
    return others


def _as_published(weight, template, masked: int) -> Outcome:
    """Return the size that the publication would state, which takes masked channels for removed ones."""
    dense, stored = weight.size, count(template).numbers
    honest, published = (1 - numbers / dense for numbers in (stored, stored - masked * weight.shape[1]))
    detail = (
        f"removed {honest:.4f} of the target; the publication would say {published:.4f}, counting {masked} input"
        " channels of the base that every batch masks anew and storage holds"
    )
    return Outcome("published_size", "", detail)


def published_keep(
    total: float, *, model: int, layers: int, experts: int, hidden: int, intermediate: int, sparsity: float
) -> float:
    """Return the fraction of every deviation that the publication keeps to remove a fraction of the whole model.

        3 L E D F - 3 L D F (1 - sparsity) - 3 L E r (D + F)  =  total * model,        keep = r (D + F) / (D F)

    with r the next whole rank. All of `sparsity` counts as removed here, also what every batch masks and storage holds:
    `Term.count` says what is stored.

    Args:
        total: removed fraction of the model.
        model: numbers in the whole model.
        layers: that have routed experts (gate, up and down).
        experts: routed experts in a layer.
        hidden: hidden size D.
        intermediate: expert intermediate size F.
        sparsity: of the base, in [0, 1).

    Raises:
        JaxmoeError: no rank of at least 1 removes as much, or the base alone is too large to remove as little.

    Source:
        D²-MoE, arXiv 2502.17298: the hyper-parameters of its appendix, which are ranks rounded up.

    Example:
        >>> mixtral = dict(model=46_702_792_704, layers=32, experts=8, hidden=4096, intermediate=14336)
        >>> round(published_keep(0.4, **mixtral, sparsity=0.1), 4)
        0.4734
    """
    unit = 3 * layers * experts * hidden * intermediate / model
    least, full = 1 - (1 - sparsity) / experts, hidden * intermediate / (hidden + intermediate)
    rank = ceil((least - total / unit) * full - 1e-9)
    if not 1 <= rank <= full * least:
        low, high = max(0.0, (least - int(full * least) / full) * unit), (least - 1 / full) * unit
        raise JaxmoeError(f"total {total}: deviations of rank 1 or more remove {low:.4f} to {high:.4f} of this model")
    return rank / full


def working_bytes(template) -> int:
    """Return the bytes of Gram matrices, eigenvectors, float32 factors and deviations."""
    experts, out, in_ = template[0].shape
    side = min(out, in_)
    return 4 * experts * (3 * side**2 + side * (out + in_) + 2 * out * in_)


D2MOE = Method(
    "d2moe",
    "a base for all experts and low-rank deviations",
    D2MoESettings,
    targets,
    slot,
    fit,
    working_bytes,
    requires,
)
