"""SVD: every expert's matrices as a thin pair of factors, the closest of that rank.

    W_e = L_e R_e          minimising || (W_e - L_e R_e) C_e^(1/2) ||, C_e = E[x xᵀ] where second moments are given

setting="paper": gate, up and down apart, one rank for all experts. setting="improved": gate and up stacked along their
outputs, so that they share R_e, which at equal size is the strongest plain form known; and the ranks of the experts of
a layer go where they keep the most energy. Source: Eckart and Young 1936; with moments SVD-LLM (arXiv 2403.07378)
without its inverse.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxmoe.allocation import water_fill
from jaxmoe.factors import Grouped, LayerShape, LinearShape, LowRank
from jaxmoe.methods.low_rank import expert_factors
from jaxmoe.methods.method import Evidence, Fit, Method, Slot, check_setting, stacked_targets


@dataclass(frozen=True, kw_only=True)
class SVDSettings:
    """Settings of the method: `setting` is "paper" or "improved".

    Example:
        >>> SVDSettings().setting
        'improved'
    """

    setting: str = "improved"

    def __post_init__(self):
        check_setting(self.setting)


def break_even(shape: tuple[int, int, int]) -> int:
    """Return the highest rank at which a pair of factors stores fewer numbers than the matrix `[_, out, in]`.

    Example:
        >>> break_even((1, 64, 128))
        42
    """
    _, out, in_ = shape
    return (out * in_ - 1) // (out + in_)


def targets(shape: LayerShape, settings: SVDSettings) -> Mapping[str, float]:
    """Return what is replaced: every projection, or gate and up as one."""
    return dict.fromkeys(shape.projections, 1.0) if settings.setting == "paper" else stacked_targets(shape)


def slot(target: str, shape: LayerShape, dtype, settings: SVDSettings, kept: float, *, weighted: bool = False) -> Slot:
    """Return a ladder of ranks: of every expert (paper), or of all together."""
    sizes = shape.of(target)
    most, experts = break_even(sizes), shape.experts
    if settings.setting == "paper":
        return Slot(lambda rank: (LowRank.abstract(sizes, dtype, rank=rank),), 1, most)
    return Slot(lambda total: (Grouped.abstract(sizes, dtype, total=total),), experts, experts * most)


def linear_slot(shape: LinearShape, dtype, settings: SVDSettings) -> Slot:
    """Return the ladder of ranks of a linear map beside the routed experts; none of them saves where `high` is 0."""
    return Slot(lambda rank: (LowRank.abstract(shape.terms, dtype, rank=rank),), 1, break_even(shape.terms))


def pairs(weight, template, moment) -> tuple[LowRank | Grouped]:
    """Return the closest factors under a second moment or its diagonal: of one rank, or of ranks by energy."""
    (term,) = template
    even = isinstance(term, LowRank)
    found = expert_factors(weight, moment, term.rank if even else min(term.shape[1:]))
    if even:
        dtype = term.left.dtype
        return (LowRank(left=found.left.astype(dtype), right=found.right.astype(dtype)),)
    ranks, _ = water_fill(found.energies, 1, term.bases.shape[0], minimum=1)
    return (Grouped.build(found.left, found.right, ranks, dtype=term.bases.dtype),)


def fit(weight, template, settings: SVDSettings, *, evidence: Evidence, key=None) -> Fit:
    """Return the factors of one target."""
    return Fit(pairs(weight, template, evidence.moment))


def working_bytes(template) -> int:
    """Return the bytes of Gram matrices, eigenvectors and float32 factors."""
    (term,) = template
    experts, out, in_ = term.shape
    rank = term.rank if isinstance(term, LowRank) else min(out, in_)
    return 4 * experts * (3 * min(out, in_) ** 2 + rank * (out + in_))


SVD = Method(
    "svd",
    "truncated SVD of every expert",
    SVDSettings,
    targets,
    slot,
    fit,
    working_bytes,
    linear_slot=linear_slot,
)
