"""Merge experts that compute similar outputs into clusters, by the tree of their distances."""

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.cluster.hierarchy import fcluster, linkage

from jaxmoe.errors import JaxmoeError


def cluster(outputs: Float[np.ndarray, "expert feature"], clusters: int) -> Int[np.ndarray, " expert"]:
    """Return the cluster of every expert by average linkage; clusters are numbered by their first expert.

    Args:
        outputs: what stands for an expert, such as its mean output, `[expert, feature]`.
        clusters: how many there are to be, 1 to the number of experts.

    Returns:
        `[expert]`, 0 to clusters - 1, each at least once. More clusters only split those of fewer.

    Source:
        HC-SMoE, arXiv 2410.08589, section 3.2: Euclidean distances.

    Example:
        >>> cluster(np.array([[0.0], [5.0], [0.1], [5.2]]), 2).tolist()
        [0, 1, 0, 1]
    """
    experts = len(outputs)
    if not 1 <= clusters <= experts or not np.isfinite(outputs).all():
        raise JaxmoeError(f"{clusters} clusters of {experts} experts: give 1 to {experts}, and finite outputs")
    if experts == 1:
        return np.zeros(1, np.int64)
    tree = linkage(np.asarray(outputs, np.float64), method="average")
    # `maxclust` gives fewer clusters where distances are equal; cutting by the number of merges does not.
    tree[:, 2] = np.arange(1, experts)
    labels = fcluster(tree, experts - clusters + 0.5, criterion="distance")
    _, first = np.unique(labels, return_index=True)
    numbers = {labels[position]: number for number, position in enumerate(sorted(first))}
    return np.array([numbers[label] for label in labels])


def merge(
    weight: Float[np.ndarray, "expert out in"], labels: Int[np.ndarray, " expert"], shares: Num[np.ndarray, " expert"]
) -> Float[np.ndarray, "cluster out in"]:
    """Return the mean of every cluster's experts, weighed by their shares; the plain mean where these are all zero.

        M_c = sum_{e in c} z_e W_e / sum_{e in c} z_e

    Args:
        weight: `[expert, out, in]`.
        labels: from `cluster`.
        shares: z, at least 0, such as routing counts, `[expert]`.

    Source:
        HC-SMoE, arXiv 2410.08589.

    Example:
        >>> experts = np.array([[[1.0]], [[4.0]], [[7.0]]])
        >>> merge(experts, np.array([0, 0, 1]), np.array([1.0, 2.0, 0.0])).ravel().tolist()
        [3.0, 7.0]
    """
    merged = np.empty((labels.max() + 1, *weight.shape[1:]), np.float32)
    for number in range(len(merged)):
        members = np.flatnonzero(labels == number)
        own = np.asarray(shares, np.float64)[members]
        own = own / own.sum() if own.sum() > 0 else np.full(len(members), 1 / len(members))
        merged[number] = np.einsum("e,eoi->oi", own, np.asarray(weight[members], np.float64))
    return merged
