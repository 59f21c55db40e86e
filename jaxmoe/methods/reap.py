"""REAP (arXiv 2510.13999): drop the experts that add the least to the tokens that choose them.

    score_e = mean over the tokens routed to e of  w_te |f_e(x_t)|,     w as the model uses it

The released code also spares experts with outlying activations; no statistic here keeps those.
"""

import jax.numpy as jnp
import numpy as np

from jaxmoe.methods.method import Evidence
from jaxmoe.methods.pruning import Pruned, PruningMethod, PruningSettings, needs, statistic
from jaxmoe.scores import router_weighted_output_norm
from jaxmoe.solvers.channels import keep_best


def fit(evidence: Evidence, keep: int, settings: PruningSettings, *, groups: int = 1) -> Pruned:
    """Return the experts of the largest mean router-weighted output norm."""
    sums, counts = (jnp.asarray(statistic(evidence, name)) for name in ("weighted_output_norms", "counts"))
    return Pruned(keep_best(np.asarray(router_weighted_output_norm(sums, counts)), keep, groups))


REAP = PruningMethod(
    "reap",
    "drop the experts that add the least to their tokens",
    PruningSettings,
    "experts",
    fit,
    needs("counts", "weighted_output_norms"),
)
