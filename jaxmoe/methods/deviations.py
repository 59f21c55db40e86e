"""Deviations of the experts from their base, W_e - base ~ L_e R_e: what weights them, their fit, and whether they pay.

Whitening needs no inverse and no Cholesky factor: a deviation D is projected on leading eigenvectors of D C D'.
Source: D²-MoE, arXiv 2502.17298; the comparison with factors of the experts themselves is ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxmoe.allocation import water_fill
from jaxmoe.arrays import AnyArray
from jaxmoe.factors import Grouped, LowRank, Term
from jaxmoe.methods.low_rank import balanced, expert_factors
from jaxmoe.methods.method import Evidence, Outcome, count
from jaxmoe.solvers.merging import shared_energy
from jaxmoe.solvers.mixture import squared_norms
from jaxmoe.solvers.shared_right import shared_right

DELTAS = ("whitened", "asvd", "plain")
"""What deviations are fitted under: the second moments, the roots of their diagonals, or the identity."""

UNSEEN = 1e-6
"""What published moments get in every direction, in units of the mean eigenvalue.

The publication has none: with fewer tokens than inputs, ranks beyond their number would then serve nothing at all, and
not even the full rank would give an expert back. Where tokens have been it changes nothing that is worth storing.
"""


def deviation_moment(
    evidence: Evidence, *, delta: str, own: bool
) -> tuple[Float[AnyArray, "..."] | None, list[Outcome]]:
    """Return what weights the deviations, `[1|expert, in]` or `[1|expert, in, in]` or None, and what should be known.

    Args:
        evidence: what is known of the target.
        delta: one of `DELTAS`.
        own: whether every expert has its own sums of x x' as they are (published), or the shrunk moments.
    """
    outcomes: list[Outcome] = []
    if delta == "plain":
        return None, outcomes
    if own:
        name = "intermediate_moments" if evidence.target == "down" else "input_moments"
        moment = evidence.statistic(name)
        moment = _scaled(moment, evidence.counts, outcomes)
    else:
        moment = evidence.moment
        if moment is None:
            outcomes.append(Outcome("unweighted", "", "no second moments are known: deviations are plain SVDs"))
    if moment is None or delta == "whitened":
        return moment, outcomes
    # ASVD scales inputs by their size to the power of 1/2; the root mean square stands for the mean of |x|.
    return np.sqrt(np.maximum(np.diagonal(np.asarray(moment), axis1=1, axis2=2), 0.0)), outcomes


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


def fit_deviations(
    delta: Float[AnyArray, "expert out in"],
    abstract: Term,
    moment: Float[AnyArray, "..."] | None,
    *,
    without: Int[np.ndarray, " trimmed"],
    even: bool,
) -> Term:
    """Return low-rank deviations in the form of the template.

    Args:
        delta: what the experts differ from their base by.
        abstract: a `LowRank`, a rank for each; a `Grouped` of single experts, ranks as they need them; or a `Grouped`
            of all experts, which share their right factor.
        moment: what `deviation_moment` gave.
        without: the experts that go without a deviation.
        even: whether the others have equal ranks (published).
    """
    experts, out, in_ = abstract.shape
    if isinstance(abstract, LowRank):
        left, right = balanced(expert_factors(delta, moment, abstract.rank))
        dtype = abstract.left.dtype
        return LowRank(left=left.astype(dtype), right=right.astype(dtype))
    assert isinstance(abstract, Grouped)
    total, dtype = abstract.bases.shape[0], abstract.bases.dtype
    if abstract.size > 1:
        left, right = shared_right(delta, rank=total, moment=moment)
        left = left.at[without].set(0.0)
        return Grouped.build(left, right[None], [total], size=experts, dtype=dtype)
    rank = min(out, in_)
    found = expert_factors(delta, moment, rank)
    minimum = np.ones(experts, np.int64)
    caps = np.full(experts, rank)
    minimum[without], caps[without] = 0, 0
    if even:
        # One rank for all who have any.
        energies = np.where(caps[:, None] > 0, np.arange(rank, 0, -1.0), 0.0)
    else:
        energies = np.asarray(found.energies, np.float64)
    ranks, _ = water_fill(energies, 1, total, minimum=minimum, caps=caps)
    left, right = balanced(found)
    return Grouped.build(left, right, ranks, dtype=dtype)


def base_or_none(
    weight: Float[AnyArray, "expert out in"],
    terms: tuple[Term, ...],
    template: tuple[Term, ...],
    moment: Float[AnyArray, "..."] | None,
    base: Float[AnyArray, "out in"],
) -> tuple[tuple[Term, ...], Outcome]:
    """Return base and deviations, or factors of the experts themselves where these are closer at equal size.

    Args:
        weight: the target's matrices, in float32.
        terms: their base and deviations.
        template: the abstract terms, which set the size.
        moment: what `deviation_moment` gave.
        base: the base that the deviations saw.
    """
    experts, out, in_ = weight.shape
    dtype, size = jax.tree.leaves(terms)[0].dtype, count(template)
    # Ranks of single experts are whole numbers of four bytes, which the template may not have.
    spare = min(size.numbers - experts, (size.bytes - 4 * experts) // np.dtype(dtype).itemsize)
    found = expert_factors(weight, moment, min(out, in_))
    ranks, _ = water_fill(np.asarray(found.energies, np.float64), 1, spare // (out + in_), minimum=0)
    left, right = balanced(found)
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
        return terms, Outcome("base", "", f"{words}: kept")
    return others, Outcome("no_base", "", f"{words}: factors of the experts themselves are closer at equal size")
