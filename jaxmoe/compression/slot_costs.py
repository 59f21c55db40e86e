"""What the slots of a model cost when they shrink, measured on weights and statistics before a budget is shared.

A slot is one target of one layer. Its loss is what removing all of it would cost by the diagonal Fisher information,
sum F W^2; its energies are the squared singular values of its experts' (weighted) matrices. One layer is read at a
time, and what stays is a number or a spectrum for each slot.
"""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.allocation import Shares, by_energy, by_loss, by_odds
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.roles import LinearMap
from jaxmoe.compression.evidence import LayerSums, Sums, fisher_information, moments
from jaxmoe.compression.linear_maps import linear_moment, read_matrix
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.method import linear_weight
from jaxmoe.methods.svd import break_even
from jaxmoe.solvers.weighted_svd import weighted_energies

RULES = ("uniform", "importance", "spectral")
"""How a budget may be shared over the targets of all layers, see `allocation.shares`."""


def choose_rule(asked: str | None, preferred: str, statistics: Sums | None) -> str:
    """Return the rule that was asked for, or the preferred one where the statistics allow it, else "uniform".

    Raises:
        JaxmoeError: the rule is unknown, or the statistics lack what it needs; the message says how to get it.

    Example:
        >>> choose_rule(None, "importance", None)
        'uniform'
    """
    if asked is not None and asked not in RULES:
        raise JaxmoeError(f"allocation {asked!r}: give {', '.join(RULES)}")
    rule = asked or preferred
    lacking = _lacking(rule, statistics)
    if lacking and asked is not None:
        raise JaxmoeError(f"allocation {asked}: {lacking}")
    return "uniform" if lacking else rule


def _lacking(rule: str, statistics: Sums | None) -> str | None:
    if rule == "uniform" or (rule == "spectral" and statistics is None):
        return None
    if rule == "importance" and (statistics is None or "fisher_down" not in statistics.keeps):
        return "needs the Fisher information: calibrate with --gradients sequence and give the --statistics"
    assert statistics is not None
    if statistics.describe()["sequential"]:
        return "needs the statistics of all layers before the first is compressed: leave --sequential out"
    return None


def shares(
    rule: str,
    checkpoint: Checkpoint,
    targets: Sequence[Mapping[str, float]],
    statistics: Sums | None,
    linears: Sequence[LinearMap] = (),
) -> Shares:
    """Return how the slots of a model share a budget, layer by layer and target by target.

    Args:
        rule: one of `RULES`.
        checkpoint: the source.
        targets: the weights of each layer's targets.
        statistics: what calibration says.
        linears: linear maps beside the experts, which come after these; "importance" knows nothing of them.
    """
    if rule == "uniform":
        weights = [weight for own in targets for weight in own.values()]
        return by_odds(weights + [linear_weight(own.name) for own in linears])
    sizes = [int(np.prod(layer.shape.of(t))) for layer, own in zip(checkpoint.layers, targets) for t in own]
    sizes += [own.shape.numbers for own in linears]
    measured = list(_measure(rule, checkpoint, targets, statistics))
    measured += [_measure_linear(checkpoint, own, statistics) for own in linears]
    if rule == "importance":
        return by_loss(sizes, [loss for loss, _, _ in measured])
    _, energies, costs = zip(*measured)
    return by_energy(energies, costs, sizes)


def _measure(rule, checkpoint, targets, statistics) -> Iterator[tuple[float, np.ndarray, int]]:
    for layer, own in zip(checkpoint.layers, targets, strict=True):
        sums = None if statistics is None else statistics.layer(layer.index)
        for target, weight in own.items():
            matrices = checkpoint.target(layer, target)
            loss = fisher_loss(matrices, sums, target)
            loss = weight * matrices.size if loss is None else loss
            energies = spectrum(matrices, moments(sums, target), loss) if rule == "spectral" else np.zeros(0)
            yield loss, energies, sum(matrices.shape[1:])


def _measure_linear(
    checkpoint: Checkpoint, source: LinearMap, statistics: Sums | None
) -> tuple[float, np.ndarray, int]:
    matrix, loss = read_matrix(checkpoint, source)[None], linear_weight(source.name) * source.shape.numbers
    return loss, spectrum(matrix, linear_moment(statistics, source), loss), sum(source.shape)


def fisher_loss(weight: np.ndarray, sums: LayerSums | None, target: str) -> float | None:
    """Return sum F W^2 over a target's matrices, None where the Fisher information is unknown."""
    fisher = fisher_information(sums, target)
    if fisher is None:
        return None
    return float(sum(np.vdot(own, matrix.astype(np.float64) ** 2) for own, matrix in zip(fisher, weight)))


@jax.jit
def _energies(weight, moment):
    return weighted_energies(weight, column_moment=moment)


def spectrum(weight: np.ndarray, moment: np.ndarray | None, loss: float) -> np.ndarray:
    """Return the energies of all experts of a target in descending order; with those cut off, they sum to `loss`.

    No more of them than the ranks that can save anything.

    Args:
        weight: matrices, `[expert, out, in]`.
        moment: what weighs their errors, `[1|expert, in, in]`; None for an unweighted error.
        loss: what removing all of them costs.
    """
    with jax.enable_x64(moment is not None):
        kind = jnp.float32 if moment is None else jnp.float64
        found = _energies(jnp.asarray(weight, kind), None if moment is None else jnp.asarray(moment, kind))
        energies = np.asarray(found, np.float64)
    total = energies.sum()
    energies = energies * (loss / total if total > 0 else 0.0)
    return -np.sort(-energies.reshape(-1))[: len(weight) * break_even(weight.shape)]
