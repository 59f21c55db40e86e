"""Put the neurons of the experts in one order: an expert is the same function whatever the order of its channels.

    minimise  sum_e || N_e[perm_e] - R ||^2  over permutations,    N_e = [gate_e | up_e | down_e'], a row for a neuron

Given the reference R, the best permutation of each expert is a linear assignment, solved exactly; given permutations,
the best R is the mean. In turns they give a barycenter: the expert that all others are closest to. Rows of gate and up
and columns of down move together, so that nothing needs to be stored.

Cost: F^2 K products and F^3 steps of the assignment per expert and turn, on the host in float64; a third of a second at
F = 1000, K = 6144. It moves whole neurons, does not mix them, and keeps signs: the activation is not symmetric.
Source: ResMoE, arXiv 2503.06881, section 4, whose free-support Wasserstein barycenter with uniform weights this is.
"""

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.optimize import linear_sum_assignment

from jaxmoe.errors import JaxmoeError


def neuron_matrix(
    gate: Float[np.ndarray, "expert channel in"] | None,
    up: Float[np.ndarray, "expert channel in"],
    down: Float[np.ndarray, "expert out channel"],
) -> Float[np.ndarray, "expert channel features"]:
    """Return the neurons of every expert, `[gate | up | down']`, each part scaled to a mean square of 1.

    Args:
        gate: `[expert, F, D]`; None where the experts have no gate.
        up: `[expert, F, D]`.
        down: `[expert, D, F]`.

    Returns:
        `[expert, F, 3 D]` (2 D without a gate), float64; a part of zeros stays zero.

    Raises:
        JaxmoeError: shapes that do not match.

    Source:
        ResMoE, arXiv 2503.06881; the scaling is ours, so that no part decides alone.

    Example:
        >>> neuron_matrix(None, np.full((1, 1, 2), 5.0), np.full((1, 2, 1), 0.1)).tolist()
        [[[1.0, 1.0, 1.0, 1.0]]]
    """
    parts = [np.asarray(part, np.float64) for part in (gate, up, np.swapaxes(down, 1, 2)) if part is not None]
    if len({part.shape for part in parts}) > 1:
        raise JaxmoeError(f"{[part.shape for part in parts]}: give [expert, F, D] twice and [expert, D, F]")
    sizes = [np.sqrt(np.mean(part**2)) for part in parts]
    return np.concatenate([part / (size or 1.0) for part, size in zip(parts, sizes, strict=True)], axis=2)


def align(
    neurons: Num[np.ndarray, "expert channel features"], reference: Num[np.ndarray, "channel features"]
) -> Int[np.ndarray, "expert channel"]:
    """Return the order of every expert's neurons that is closest to a reference.

    Args:
        neurons: `[expert, F, K]`.
        reference: `[F, K]`.

    Returns:
        `[expert, F]`, a permutation each: neuron `perm[e, i]` of expert e stands for neuron i of the reference, so
        `neurons[e][perm[e]]` is aligned, as are `gate[e][perm[e]]`, `up[e][perm[e]]` and `down[e][:, perm[e]]`.

    Raises:
        JaxmoeError: shapes that do not match, or numbers that are not finite.

    Source:
        Kuhn 1955 for the assignment; ResMoE, arXiv 2503.06881.

    Example:
        >>> align(np.array([[[0.0, 2.0], [3.0, 0.0]]]), np.eye(2)).tolist()
        [[1, 0]]
    """
    neurons, reference = np.asarray(neurons), np.asarray(reference, np.float64)
    if neurons.ndim != 3 or reference.shape != neurons.shape[1:]:
        raise JaxmoeError(f"neurons {neurons.shape} with a reference {reference.shape}: give [expert, F, K] and [F, K]")
    if not (np.isfinite(neurons).all() and np.isfinite(reference).all()):
        raise JaxmoeError("the neurons or their reference are not finite: there is no closest order")
    found = np.empty(neurons.shape[:2], np.int64)
    for expert, own in enumerate(neurons):
        # A permutation changes no norm, so the closest is that of the largest products.
        found[expert] = linear_sum_assignment(reference @ own.astype(np.float64).T, maximize=True)[1]
    return found


def barycenter(
    neurons: Float[np.ndarray, "expert channel features"], *, iterations: int = 10
) -> Float[np.ndarray, "channel features"]:
    """Return the mean of aligned experts, aligned to it: a local minimum of sum_e || N_e[perm_e] - R ||^2.

    Starts from the first expert; each turn lowers the objective, and it stops early where no neuron moves any more.

    Args:
        neurons: `[expert, F, K]`.
        iterations: turns at most, at least 1.

    Returns:
        `[F, K]`, float64, in the order of the first expert's neurons at the first turn.

    Raises:
        JaxmoeError: fewer than one turn, or what `align` refuses.

    Source:
        ResMoE, arXiv 2503.06881, section 4; Cuturi and Doucet 2014 for the turns.

    Example:
        >>> barycenter(np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [3.0, 0.0]]]), iterations=2).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    if iterations < 1:
        raise JaxmoeError(f"{iterations} iterations: give at least 1")
    neurons = np.asarray(neurons, np.float64)
    reference, before = neurons[0], None
    for _ in range(iterations):
        order = align(neurons, reference)
        if before is not None and np.array_equal(order, before):
            break
        reference, before = np.take_along_axis(neurons, order[:, :, None], 1).mean(0), order
    return reference
