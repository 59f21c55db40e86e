"""Frequency pruning: drop the experts that the router chooses most rarely. The floor line of every comparison.

score_e = z_e, tokens that chose e; of equal ones the sum of router weights decides
"""

import numpy as np

from jaxmoe.methods.method import Evidence
from jaxmoe.methods.slimming import Slimmed, SlimMethod, SlimSettings, needs, statistic
from jaxmoe.solvers.slimming import keep_best


def fit(evidence: Evidence, keep: int, settings: SlimSettings, *, groups: int = 1) -> Slimmed:
    """Return the experts that the most tokens chose."""
    counts, weights = statistic(evidence, "counts"), statistic(evidence, "weight_sums")
    # Ranks from both: rarely chosen first.
    order = np.lexsort((-np.arange(len(counts)), weights, counts))
    ranks = np.empty(len(counts))
    ranks[order] = np.arange(len(counts))
    return Slimmed(keep_best(ranks, keep, groups))


FREQUENCY = SlimMethod(
    "frequency", "drop the rarely chosen experts", SlimSettings, "experts", fit, needs("counts", "weight_sums")
)
