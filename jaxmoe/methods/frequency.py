"""Frequency pruning: drop the experts that the router chooses most rarely. The floor line of every comparison.

score_e = z_e, tokens that chose e; of equal ones the sum of router weights decides
"""

import numpy as np

from jaxmoe.methods.method import Evidence
from jaxmoe.methods.pruning import Pruned, PruningMethod, PruningSettings, needs, statistic
from jaxmoe.solvers.channels import keep_best


def fit(evidence: Evidence, keep: int, settings: PruningSettings, *, groups: int = 1) -> Pruned:
    """Return the experts that the most tokens chose."""
    counts, weights = statistic(evidence, "counts"), statistic(evidence, "weight_sums")
    # Ranks from both: rarely chosen first.
    order = np.lexsort((-np.arange(len(counts)), weights, counts))
    ranks = np.empty(len(counts))
    ranks[order] = np.arange(len(counts))
    return Pruned(keep_best(ranks, keep, groups))


FREQUENCY = PruningMethod(
    "frequency", "drop the rarely chosen experts", PruningSettings, "experts", fit, needs("counts", "weight_sums")
)
