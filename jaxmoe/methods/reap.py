"""REAP (arXiv 2510.13999): drop the experts that add the least to the tokens that choose them.

    score_e = mean over the tokens routed to e of  w_te |f_e(x_t)|,     w as the model uses it

The released code also spares experts with outlying activations; no statistic here keeps those.
"""

import jax.numpy as jnp
import numpy as np

from jaxmoe.methods.method import Evidence
from jaxmoe.methods.slimming import Slimmed, SlimMethod, SlimSettings, needs, statistic
from jaxmoe.scores import router_weighted_output_norm
from jaxmoe.solvers.slimming import keep_best


def fit(evidence: Evidence, keep: int, settings: SlimSettings, *, groups: int = 1) -> Slimmed:
    """Return the experts of the largest mean router-weighted output norm."""
    sums, counts = (jnp.asarray(statistic(evidence, name)) for name in ("weighted_output_norms", "counts"))
    return Slimmed(keep_best(np.asarray(router_weighted_output_norm(sums, counts)), keep, groups))


REAP = SlimMethod(
    "reap",
    "drop the experts that add the least to their tokens",
    SlimSettings,
    "experts",
    fit,
    needs("counts", "weighted_output_norms"),
)
