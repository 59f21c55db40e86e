"""Whether a method did worse than the plainest rival: truncated SVD of every expert, at the same stored numbers.

    sum_e || (W_e - What_e) C_e^(1/2) ||^2     against     sum_e sum_{i > r} sigma_ei^2,    r = numbers / (E (out + in))

with C_e the moment that weighs the errors, or the identity. A method that costs training and loses to two factors
should say so, which needs singular values alone, or store these factors instead.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.factors import Grouped, Term
from jaxmoe.methods.method import Evidence, Outcome, count
from jaxmoe.methods.svd import SVD
from jaxmoe.solvers.weighted_svd import weighted_energies

TOLERANCE = 1.01
"""Ratio of squared errors up to which both are called equal."""


def behind_svd(weight, terms: tuple[Term, ...], moment, target: str) -> Outcome | None:
    """Return an outcome where truncated SVD of equal size has the smaller error, else None.

    Args:
        weight: the matrices of the target, `[expert, out, in]`.
        terms: what stands for them.
        moment: what weighs the errors, `[1|expert, in, in]` or None.
        target: its name.

    Example:
        >>> from jaxmoe.factors import LowRank
        >>> weight = jnp.eye(8)[None]
        >>> nothing = LowRank(left=jnp.zeros((1, 8, 2)), right=jnp.zeros((1, 2, 8)))
        >>> behind_svd(weight, (nothing,), None, "down").kind
        'behind_svd'
    """
    experts, out, in_ = weight.shape
    rank = count(terms).numbers // (experts * (out + in_))
    energies = _energies(weight, moment)
    rival = float(energies[:, rank:].sum())
    whole = float(energies.sum())
    own = _squared_error(weight, terms, moment)
    if own <= TOLERANCE * rival + 1e-9 * whole:
        return None
    both = " and ".join(f"{np.sqrt(value / whole):.4f}" for value in (own, rival))
    how = "plain" if moment is None else "weighted"
    detail = f"{how} SVD of every expert with rank {rank}, of the same size, is closer: relative errors {both}"
    return Outcome("behind_svd", target, detail)


def svd_instead(weight, terms: tuple[Term, ...], evidence: Evidence) -> tuple[Term, ...] | None:
    """Return truncated SVD of every expert in no more bytes than some terms have, None where a rank each is too much.

    Args:
        weight: the matrices of the target, `[expert, out, in]`.
        terms: what they are to replace.
        evidence: what is known of the target.

    Example:
        >>> from jaxmoe.factors import LowRank
        >>> weight = jnp.eye(8)[None]
        >>> old = (LowRank(left=jnp.zeros((1, 8, 2)), right=jnp.zeros((1, 2, 8))),)
        >>> new = svd_instead(weight, old, Evidence(target="down"))
        >>> [(term.group_ranks, term.count().bytes <= old[0].count().bytes) for term in new or ()]
        [((1,), True)]
    """
    experts, out, in_ = weight.shape
    dtype = np.dtype(jax.tree.leaves(terms)[0].dtype)
    room = count(terms).bytes - experts * np.dtype(np.int32).itemsize
    total = room // ((out + in_) * dtype.itemsize)
    if total < experts:
        return None
    template = Grouped.abstract(weight.shape, dtype, total=int(total))
    return SVD.fit(weight, (template,), SVD.settings(), evidence=evidence).terms


def _energies(weight, moment) -> np.ndarray:
    # A moment squares the condition number, and the products once more.
    with jax.enable_x64(moment is not None):
        kind = jnp.float32 if moment is None else jnp.float64
        own = None if moment is None else jnp.asarray(moment, kind)
        return np.asarray(jax.jit(weighted_energies)(jnp.asarray(weight, kind), column_moment=own), np.float64)


def _squared_error(weight, terms, moment) -> float:
    total = 0.0
    for expert in range(weight.shape[0]):
        one = slice(expert, expert + 1)
        error = weight[one] - sum(term.materialize(one) for term in terms)
        own = None if moment is None else moment[0 if len(moment) == 1 else expert]
        matrix = np.asarray(error[0], np.float64)
        total += float(np.sum((matrix if own is None else matrix @ np.asarray(own, np.float64)) * matrix))
    return total
