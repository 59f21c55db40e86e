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
from dataclasses import dataclass
from typing import cast

import jax.numpy as jnp
import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, Grouped, LayerShape, LowRank, Shared
from jaxmoe.methods.deviations import DELTAS, base_or_none, deviation_moment, fit_deviations
from jaxmoe.methods.merged_base import MERGES, kept_channels, merge_base
from jaxmoe.methods.method import Evidence, Fit, Method, Outcome, Slot, check_setting, count, stacked_targets
from jaxmoe.methods.published_size import published_size


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
    paper = settings.setting == "paper"
    weight = jnp.asarray(weight, jnp.float32)
    moment, outcomes = deviation_moment(evidence, delta=settings.delta, own=paper)
    base, merged = merge_base(weight, cast(str, settings.merge), evidence, target=evidence.target)
    outcomes += merged
    stored = base.astype(abstract.weight.dtype)
    kept = None
    if abstract.kept is not None:
        kept = kept_channels(
            weight,
            stored,
            evidence,
            keep=abstract.kept.shape[1],
            neurons=settings.mode == "neuron",
            method=cast(str, settings.merge),
        )
    layout = {"axis": abstract.axis, "parts": abstract.parts, "dynamic": abstract.dynamic}
    shared = Shared.build(stored, experts=len(weight), kept=kept, **layout)
    # The deviation sees the base as it is stored; in the publication, before it is pruned.
    seen = jnp.asarray(stored, jnp.float32) if paper else shared.materialize(slice(1))[0]
    counts = np.zeros(len(weight)) if evidence.counts is None else np.asarray(evidence.counts)
    least = np.argsort(counts, kind="stable")[: _trimmed(settings, len(weight))]
    terms = (shared, fit_deviations(weight - seen, deltas, moment, without=least, even=paper))
    if settings.base == "auto":
        terms, outcome = base_or_none(weight, terms, template, moment, seen)
        outcomes.append(outcome)
    has_base = terms[0] is shared
    if has_base and len(least):
        detail = f"experts {', '.join(map(str, sorted(least.tolist())))}, the least routed, go without a deviation"
        outcomes.append(Outcome("trimmed", "", detail))
    if has_base and abstract.dynamic:
        outcomes.append(published_size(template, abstract.dynamic))
    return Fit(terms, outcomes=tuple(outcomes))


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
