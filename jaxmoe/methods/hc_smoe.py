"""HC-SMoE (arXiv 2410.08589): merge the experts whose mean outputs are close, and leave the router as it is.

    clusters of mean_t f_e(x_t) by average linkage,     M_c = sum_{e in c} z_e W_e / sum_{e in c} z_e

The released code takes the mean over all tokens of the layer; here it is over those that chose the expert, which is
what calibration keeps. The improved setting first brings all experts' neurons into the order of the most chosen one
(as ResMoE does, arXiv 2503.06881): the mean of neurons that do different things is none of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxmoe.factors import LayerShape, Merged
from jaxmoe.methods.method import REORDERED, Evidence, Fit, Method, Outcome, Slot, check_setting
from jaxmoe.methods.pruning import MEND, statistic
from jaxmoe.solvers.alignment import align, neuron_matrix
from jaxmoe.solvers.clustering import cluster, merge


@dataclass(frozen=True, kw_only=True)
class HCSMoESettings:
    """Settings of HC-SMoE.

    Args:
        setting: "paper" or "improved".
        aligned: whether neurons are brought into one order before they are merged; None for what the setting says.
    """

    setting: str = "improved"
    aligned: bool | None = None

    def __post_init__(self):
        check_setting(self.setting)
        if self.aligned is None:
            object.__setattr__(self, "aligned", self.setting == "improved")


def targets(shape: LayerShape, settings: HCSMoESettings) -> Mapping[str, float]:
    """Return what is replaced: every projection, by the same clusters or one more of the same tree."""
    return dict.fromkeys(shape.projections, 1.0)


def slot(
    target: str, shape: LayerShape, dtype, settings: HCSMoESettings, kept: float, *, weighted: bool = False
) -> Slot:
    """Return a ladder of clusters."""
    sizes = shape.of(target)
    return Slot(lambda clusters: (Merged.abstract(sizes, dtype, clusters=clusters),), 1, shape.experts - 1)


def fit(weight, template, settings: HCSMoESettings, *, evidence: Evidence, key=None) -> Fit:
    """Return the merged matrices of one target."""
    (term,) = template
    counts = statistic(evidence, "counts")
    labels = cluster(statistic(evidence, "output_sums") / np.maximum(1, counts)[:, None], term.weight.shape[0])
    experts, outcomes = np.asarray(weight, np.float32), ()
    if settings.aligned:
        experts = _ordered(experts, evidence, counts)
        detail = "neurons stand in another order than the original's, which its error counts as if it mattered"
        outcomes = (Outcome(REORDERED, "", detail),)
    merged = jnp.asarray(merge(experts, labels, counts)).astype(term.weight.dtype)
    return Fit((Merged(weight=merged, labels=jnp.asarray(labels, jnp.int32)[None]),), outcomes=outcomes)


def _ordered(weight: np.ndarray, evidence: Evidence, counts: np.ndarray) -> np.ndarray:
    """Return a target's matrices with the channels of all experts in the order of the most chosen one's."""
    down = np.asarray(evidence.weight("down"), np.float32)
    gate = np.asarray(evidence.weight("gate"), np.float32) if evidence.gated else None
    neurons = neuron_matrix(gate, np.asarray(evidence.weight("up"), np.float32), down)
    order = align(neurons, neurons[int(np.argmax(counts))])
    index = order[:, None, :] if evidence.target == "down" else order[:, :, None]
    return np.take_along_axis(weight, index, axis=2 if evidence.target == "down" else 1)


def working_bytes(template) -> int:
    """Return the bytes of the neurons in float64 and of an aligned copy."""
    (term,) = template
    experts, out, in_ = term.shape
    return experts * out * in_ * (3 * 8 + 4)


def requires(settings: HCSMoESettings) -> Mapping[str, str]:
    """Return the statistics that are needed."""
    return {"counts": MEND, "output_sums": MEND}


HC_SMOE = Method(
    "hc_smoe", "merge experts of like outputs", HCSMoESettings, targets, slot, fit, working_bytes, requires
)
