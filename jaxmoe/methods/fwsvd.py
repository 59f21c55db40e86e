"""FWSVD: thin pairs of factors, the closest under what each input channel of a matrix is worth to the loss.

    W_e = L_e R_e          minimising || (W_e - L_e R_e) diag(I_e)^(1/2) ||,     I_ej = sum_i E[(dL / dW_eij)^2]

setting="paper": gate, up and down apart, one rank for all experts, the Fisher information of each column as its weight.
setting="improved": the second moments of the inputs in its place, where they are known: they say the same and more of
an input, its correlations with others. Then it is `svd` with gate and up apart, and the ranks of a layer's experts go
where they keep the most energy. An expert that no gradient reached is fitted plainly.
Source: Hsu et al. 2022, arXiv 2207.00112, whose W is `[in, out]`: its rows are our columns.
"""

from collections.abc import Mapping

import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.methods.method import DOWN_WEIGHT, Evidence, Fit, Method, Outcome
from jaxmoe.methods.svd import SVDSettings, pairs, slot, working_bytes

FLOOR = 1e-3
"""Least weight of an input channel, in units of its expert's mean: no channel may cost nothing."""


def targets(shape: LayerShape, settings: SVDSettings) -> Mapping[str, float]:
    """Return what is replaced: every projection; improved, down with its weight."""
    heavy = {} if settings.setting == "paper" else {"down": DOWN_WEIGHT}
    return dict.fromkeys(shape.projections, 1.0) | heavy


def requires(settings: SVDSettings) -> Mapping[str, str]:
    """Return that the weights are squared gradients; improved, second moments do."""
    mend = "calibrate with gradients, or take --setting improved"
    return {"fisher_up": mend, "fisher_down": mend} if settings.setting == "paper" else {}


def importance(fisher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what each input channel is worth, `[expert, in]`, and which experts no gradient reached.

    Args:
        fisher: squared gradients, `[expert, out, in]`.

    Raises:
        JaxmoeError: NaN or infinity among them.

    Example:
        >>> found, unknown = importance(np.array([[[4.0, 1, 1], [9, 1, 0]], [[0.0, 0, 0], [0, 0, 0]]]))
        >>> found.tolist(), unknown.tolist()
        ([[13.0, 2.0, 1.0], [1.0, 1.0, 1.0]], [1])
    """
    columns = np.asarray(fisher, np.float64).sum(1)
    if not np.isfinite(columns).all():
        raise JaxmoeError("NaN or infinity in the squared gradients: calibrate again")
    mean = columns.mean(1, keepdims=True)
    return np.where(mean > 0, np.maximum(columns, FLOOR * mean), 1.0), np.flatnonzero(mean[:, 0] <= 0)


def fit(weight, template, settings: SVDSettings, *, evidence: Evidence, key=None) -> Fit:
    """Return the factors of one target."""
    moment, outcomes = evidence.moment, ()
    if settings.setting == "paper" or moment is None:
        fisher = evidence.statistic(f"fisher_{evidence.target}")
        if fisher is None:
            moment, outcomes = None, (Outcome("no_fisher", "", "there are no squared gradients of it: plain SVD"),)
        else:
            moment, unknown = importance(fisher)
            if len(unknown):
                detail = f"experts {', '.join(map(str, unknown))}: no gradient reached them, plain SVD"
                outcomes = (Outcome("unweighted", "", detail),)
    return Fit(pairs(weight, template, moment), outcomes=outcomes)


FWSVD = Method(
    "fwsvd",
    "SVD under what each input channel is worth to the loss",
    SVDSettings,
    targets,
    slot,
    fit,
    working_bytes,
    requires=requires,
)
