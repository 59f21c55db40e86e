"""What bits cost: the loss of every width for every expert of every target, measured before a budget is shared.

    loss[e, b] = sum_ij F_ij (Q_b(W_e) - W_e)_ij^2       with the Fisher information F, nats as far as its model holds
               = w tr(D C D^T), D = Q_b(W_e) - W_e        with second moments C of the inputs alone
               = w n |D|^2 / sum_e |W_e|^2                 without statistics, n the numbers of an expert's matrix

Q_b is the method itself at b bits, w the weight of down beside gate and up where nothing is measured of what each
costs. One target is read and rounded at a time; what stays is a number for each expert and width.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxmoe.compression.evidence import Sums, evidence, fisher_information
from jaxmoe.compression.found import Found, Layer, matrices
from jaxmoe.compression.linear_maps import PlannedLinear, linear_evidence, read_matrix
from jaxmoe.factors import Dense, Term
from jaxmoe.methods import Evidence, QuantisingMethod
from jaxmoe.methods.method import linear_weight

FLOOR = 0.1
"""Least loss of an expert, in units of its target's median: one that no calibration token chose is worth something."""

Losses = Mapping[int, Mapping[str, np.ndarray]]
"""Of every expert at every width, `[expert, width]`, by layer and target; of a linear map by its name, `[1, width]`."""


def chosen_measure(statistics: Sums | None) -> str:
    """Return what losses are measured by: "fisher", "moments", or "weights" where nothing is known but these."""
    if statistics is None:
        return "weights"
    return "fisher" if "fisher_down" in statistics.keeps else "moments"


def assumed_losses(found: Found, widths: tuple[int, ...]) -> Losses:
    """Return losses that sizes alone tell: a quarter with every further bit, in down more than in gate and up."""
    falling = 4.0 ** -np.array(widths)
    losses: dict[int, dict[str, np.ndarray]] = {}
    for index, layer in found.layers.items():
        losses[index] = {
            target: np.tile(linear_weight(target) * _numbers(terms) * falling, (layer.sizes.experts, 1))
            for target, terms in layer.terms.items()
        }
    for index, linears in found.linears.items():
        for own in linears:
            weight = linear_weight(own.source.name) * own.source.shape.numbers
            losses.setdefault(index, {})[own.source.name] = weight * falling[None]
    return losses


def measured_losses(
    found: Found, method: QuantisingMethod, settings: Any, widths: tuple[int, ...], statistics: Sums | None
) -> Losses:
    """Return what each width loses, or an equivalent of it where the method has its own rule.

    Args:
        found: the model, whose values can be read.
        method: what rounds.
        settings: an instance of `method.settings`.
        widths: in bits.
        statistics: calibrated on the model, None without.
    """
    measure = chosen_measure(statistics)
    losses: dict[int, dict[str, np.ndarray]] = {}
    for position, index in enumerate(found.layers):
        sums = None if statistics is None else statistics.layer(index)
        layer = Layer(index=index, read=partial(found.read, index))
        held, read = layer.held(), partial(matrices, found.reader(layer))
        losses[index] = {}
        for target, terms in held.terms.items():
            known = evidence(sums, target, read, gated=held.sizes.gated)
            score = method.score(settings, known, position=position)
            if score is not None:
                losses[index][target] = np.outer(score, 4.0 ** -np.array(widths))
                continue
            fisher = fisher_information(sums, target) if measure == "fisher" else None
            whole = _whole(terms, known)
            losses[index][target] = _losses(terms, whole, known, fisher, method, settings, widths)
    for index, linears in found.linears.items():
        for own in linears:
            losses.setdefault(index, {})[own.source.name] = _linear(found, own, method, settings, widths, statistics)
    return losses


def _linear(found: Found, planned: PlannedLinear, method, settings, widths, statistics) -> np.ndarray:
    matrix = read_matrix(found.original, planned.source)[None]
    known, _ = linear_evidence(statistics, planned.source)
    return _losses((Dense(weight=matrix),), matrix, known, None, method, settings, widths)


def _whole(terms: tuple[Term, ...], known: Evidence) -> np.ndarray:
    """Return the matrices that terms stand for."""
    if len(terms) == 1 and isinstance(terms[0], Dense):
        return np.asarray(terms[0].materialize())
    return np.asarray(known.weight(known.target))


def _losses(
    terms: tuple[Term, ...],
    whole: np.ndarray,
    known: Evidence,
    fisher: np.ndarray | None,
    method: QuantisingMethod,
    settings: Any,
    widths: tuple[int, ...],
) -> np.ndarray:
    """Return the losses of a target, `[expert, width]`: rounded at each width as the step itself would do it."""
    experts = len(whole)
    columns = []
    for bits in widths:
        fit = method.fit(terms, settings, np.full(experts, bits), evidence=known, key=jax.random.key(0))
        rounded = sum(
            (np.asarray(term.materialize()) for term in fit.terms[1:]), np.asarray(fit.terms[0].materialize())
        )
        difference = (matrix - own for matrix, own in zip(whole, rounded, strict=True))
        columns.append([_lost(expert, own, fisher, known.moment) for expert, own in enumerate(difference)])
    found = np.array(columns).T
    if fisher is None:
        found *= linear_weight(known.target)
        if known.moment is None:
            energy = sum(float(np.vdot(matrix, matrix)) for matrix in whole)
            found *= whole[0].size / energy if energy > 0 else 0.0
    return np.maximum(found, FLOOR * np.median(found, axis=0))


def _lost(expert: int, difference: np.ndarray, fisher: np.ndarray | None, moment: np.ndarray | None) -> float:
    """Return the loss of one expert's matrix."""
    if fisher is not None:
        return float(np.vdot(fisher[expert], difference.astype(np.float64) ** 2))
    if moment is None:
        return float(np.vdot(difference, difference))
    own = moment[min(expert, len(moment) - 1)]
    return float(np.vdot(difference @ own, difference))


def _numbers(terms: tuple[Term, ...]) -> int:
    _, out, in_ = terms[0].shape
    return out * in_
