"""What calibration says about one layer, as the evidence that a fit of its targets uses.

Gate and up see the input of the layer, down the intermediate activations. Sums that were weighted by the squares of the
router weights are taken where they were kept: their error is that of the layer's output. Only a pooled moment of the
inputs serves gate and up too; what has no moment at all is fitted unweighted, and the report says so.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxmoe.calibration.inputs import InputMoment
from jaxmoe.factors import TARGETS, LayerShape
from jaxmoe.methods.method import Evidence, Outcome
from jaxmoe.solvers.second_moment import FLOOR, expert_moments, starved


@runtime_checkable
class LayerSums(Protocol):
    """Sums over the tokens of one layer; `weighted_input_moments` and `weighted_intermediate_moments` where kept."""

    @property
    def tokens(self) -> int: ...
    @property
    def counts(self) -> np.ndarray: ...
    @property
    def input_moment(self) -> np.ndarray | None: ...
    @property
    def input_moments(self) -> np.ndarray | None: ...
    @property
    def intermediate_moments(self) -> np.ndarray | None: ...


@runtime_checkable
class Sums(Protocol):
    """Calibrated statistics: one layer at a time, when asked for, and what tells them from all others.

    `keeps` names the arrays that they hold of a layer; `reads` are the folders that they come from; `inputs` returns
    the second moment of what other linear maps read, None where it was not kept; `follow` is told of every layer as
    soon as it is compressed, what is stored as terms by the arrays' names; `describe` is what the report says of them.
    """

    @property
    def keeps(self) -> frozenset[str]: ...
    @property
    def reads(self) -> tuple[Path, ...]: ...
    def layer(self, index: int) -> LayerSums: ...
    def inputs(self, index: int, name: str) -> InputMoment | None: ...
    def follow(self, index: int, parameters: Mapping[str, Any]) -> None: ...
    def fingerprint(self) -> Any: ...
    def describe(self) -> dict[str, Any]: ...


def evidence(layer: LayerSums | None, target: str, weight: Callable[[str], Any], *, gated: bool = True) -> Evidence:
    """Return what a fit of a target may use beside its matrices.

    Args:
        layer: sums of the layer, None without calibration.
        target: "gate", "up", "gate_up" or "down".
        weight: reads the matrices of a target of the layer.
        gated: whether the experts have a gate.
    """
    if layer is None:
        return Evidence(target=target, weight=weight, gated=gated)
    return Evidence(
        target=target,
        moment=moments(layer, target),
        counts=np.asarray(layer.counts),
        statistic=lambda name: getattr(layer, name, None),
        weight=weight,
        gated=gated,
    )


def fisher_information(layer: LayerSums | None, target: str) -> np.ndarray | None:
    """Return the squared gradients of a target's matrices, `[expert, out, in]`, None where they were not kept.

    Args:
        layer: sums of the layer, None without calibration.
        target: "gate", "up", "gate_up" or "down".
    """
    names = [f"fisher_{projection}" for projection in TARGETS[target]]
    parts = [part for name in names if (part := getattr(layer, name, None)) is not None]
    return np.concatenate(parts, axis=1) if len(parts) == len(names) else None


def moments(layer: LayerSums | None, target: str, *, floor: float = FLOOR) -> np.ndarray | None:
    """Return the moments that weigh a target's errors, `[expert, in, in]`, or None where nothing is known.

    Args:
        layer: sums of the layer, None without calibration.
        target: "gate", "up", "gate_up" or "down".
        floor: for directions that were never seen, see `solvers.second_moment`.

    Raises:
        JaxmoeError: the sums are not finite, or have other shapes than their counts.
    """
    if layer is None or not np.sum(layer.counts) > 0:
        return None
    sums = _sums(layer, target)
    return None if sums is None else expert_moments(sums, layer.counts, floor=floor)


def _sums(layer: LayerSums, target: str) -> np.ndarray | None:
    name = "intermediate_moments" if target == "down" else "input_moments"
    weighted = getattr(layer, f"weighted_{name}", None)
    sums = getattr(layer, name) if weighted is None else weighted
    if sums is None and target != "down" and layer.input_moment is not None and layer.tokens:
        return np.asarray(layer.counts)[:, None, None] * (layer.input_moment / layer.tokens)
    return sums


def outcomes(layer: LayerSums | None, targets: Sequence[str], shape: LayerShape) -> list[Outcome]:
    """Return what the user should know about the tokens behind a layer's moments.

    Example:
        >>> outcomes(None, ["down"], LayerShape(experts=2, hidden=4, intermediate=3))
        []
    """
    if layer is None:
        return []
    if not np.sum(layer.counts) > 0:
        return [Outcome("unweighted", "", "no calibration token reached this layer: it is fitted unweighted")]
    found = [
        Outcome("unweighted", target, "the statistics keep no second moments for it: it is fitted unweighted")
        for target in targets
        if _sums(layer, target) is None
    ]
    never = starved(layer.counts, 1, prior=1)
    few = [expert for expert in starved(layer.counts, shape.hidden) if expert not in never]
    if never:
        detail = f"no calibration token chose experts {_listed(never)}: they take the pooled second moments"
        found.append(Outcome("never_routed", "", detail))
    if few:
        detail = f"too few calibration tokens chose experts {_listed(few)}: the pooled second moments weigh more"
        found.append(Outcome("starved", "", detail))
    return found


def _listed(experts: Sequence[int], most: int = 16) -> str:
    more = f" and {len(experts) - most} more" if len(experts) > most else ""
    return ", ".join(map(str, experts[:most])) + more
