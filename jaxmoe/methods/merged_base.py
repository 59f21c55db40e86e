"""The base of a layer's experts: their merge as the evidence allows it, and which of its channels are worth storing."""

from dataclasses import replace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.factors import TARGETS
from jaxmoe.methods.method import Evidence, Outcome
from jaxmoe.solvers.merging import MergeMethod, merge, regmean, ties

MERGES = ("fisher", "fisher_freq", "freq", "mean", "regmean", "ties")
"""The ways to make a base. Without second moments `regmean` takes `freq`; without counts that takes `mean`."""


def merge_base(
    weight: Float[AnyArray, "expert out in"], method: str, evidence: Evidence, *, target: str
) -> tuple[Float[Array, "out in"], list[Outcome]]:
    """Return the merged matrices of a target, and what the user should know.

    Args:
        weight: the target's matrices, in float32.
        method: one of `MERGES`.
        evidence: what is known of the target whose fit this is.
        target: whose matrices they are.
    """
    counts, outcomes = evidence.counts, []
    counts = counts if counts is not None and np.sum(counts) > 0 else None
    if method == "regmean":
        moment = evidence.moment if target == evidence.target else None
        if moment is not None:
            return _regmean(weight, jnp.asarray(moment, jnp.float32)), []
        method = "mean" if counts is None else "freq"
    if method == "ties":
        return jax.jit(ties)(weight), []
    fisher = None
    if method in ("fisher", "fisher_freq"):
        fisher = np.concatenate([np.asarray(evidence.statistic(f"fisher_{p}")) for p in TARGETS[target]], axis=1)
        if not fisher.any():
            detail = "the Fisher information is zero everywhere: the base is the average by routed tokens"
            outcomes.append(Outcome("no_fisher", "", detail))
        elif missed := int((fisher.sum(0) == 0).sum()):
            detail = f"{missed} entries have no Fisher information: there the base is the average by routed tokens"
            outcomes.append(Outcome("partial_fisher", "", detail))
        # Squared gradients may lie below what float32 holds; their scale does not matter.
        fisher = jnp.asarray(fisher / (fisher.max() or 1.0), jnp.float32)
    if counts is None and method in ("freq", "fisher_freq"):
        outcomes.append(
            Outcome("unweighted_merge", "", "no calibration token reached this layer: the base is the mean")
        )
        method = "mean" if method == "freq" else "fisher"
    known = None if counts is None else jnp.asarray(counts)
    return merge(weight, method=cast(MergeMethod, method), fisher=fisher, counts=known), outcomes


@jax.jit
def _regmean(weight, moment):
    return regmean(weight, jnp.broadcast_to(moment, (weight.shape[0], *moment.shape[1:])), ridge=0.0)


def kept_channels(
    weight: Float[AnyArray, "expert out in"],
    base: Float[AnyArray, "out in"],
    evidence: Evidence,
    *,
    keep: int,
    neurons: bool,
    method: str,
) -> Int[np.ndarray, " keep"]:
    """Return the channels of a base that stay, ascending: those of the largest norm times activation.

    Args:
        weight: the target's matrices.
        base: their base, as it is stored.
        evidence: what is known of the target.
        keep: how many stay.
        neurons: whether channels are intermediate neurons, the same for every target, or the inputs of this one.
        method: how bases are made, one of `MERGES`.
    """
    side = "intermediate" if evidence.target == "down" or neurons else "input"
    if neurons:
        down = weight if evidence.target == "down" else jnp.asarray(evidence.weight("down"), jnp.float32)
        # Only the fit of down knows the moment of its inputs: without it every target chooses the same neurons.
        merged, _ = merge_base(down, method, replace(evidence, moment=None), target="down")
        base = merged.astype(base.dtype)
    moments = evidence.statistic(f"{side}_moments")
    size = np.linalg.norm(np.asarray(base, np.float64), axis=0)
    if moments is not None:
        size = size * np.sqrt(np.maximum(np.einsum("eii->i", np.asarray(moments)), 0.0))
    return np.sort(np.argsort(-size, kind="stable")[:keep])
