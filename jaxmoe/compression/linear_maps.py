"""Linear maps beside the routed experts, as a step replaces them: what is stored, what is known, how far it is off."""

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.factored_format import LinearLayout, LinearModule
from jaxmoe.checkpoint.roles import LinearMap
from jaxmoe.compression.evidence import Sums
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLinear, Count
from jaxmoe.factors.error import linear_error
from jaxmoe.methods import Evidence, Outcome
from jaxmoe.solvers.second_moment import FLOOR, expert_moments


@dataclass(frozen=True, kw_only=True)
class PlannedLinear:
    """A linear map that a step replaces.

    Args:
        source: where it lies.
        dtype: of its factors.
        template: abstract terms.
    """

    source: LinearMap
    dtype: np.dtype
    template: CompressedLinear

    def before(self, checkpoint: Checkpoint) -> Count:
        """Count what its matrix takes on disk; scales of a quantised one are bytes, not numbers."""
        parts = checkpoint.matrices[self.source.tensor].parts
        return Count(self.source.shape.numbers, sum(part.bytes for part in parts))

    def module(self, spec: list[dict[str, Any]]) -> LinearModule:
        """Return what the record of a factored checkpoint says of it, given the spec of what is stored."""
        layout = msgspec.convert({"dtype": self.dtype.name, "name": self.source.tensor}, LinearLayout)
        return LinearModule(self.source.shape, spec, layout, self.source.bias)


def read_matrix(checkpoint: Checkpoint, source: LinearMap) -> np.ndarray:
    """Return the matrix of a map in float32, `[out, in]`.

    Raises:
        JaxmoeError: a weight is NaN or infinite.
    """
    matrix = np.asarray(checkpoint.matrices[source.tensor].read(), np.float32)
    if not np.isfinite(matrix).all():
        file = checkpoint.matrices[source.tensor].parts[0].file
        raise JaxmoeError(
            f"NaN or infinite weights in {source.tensor} in {file}: the checkpoint is damaged, fetch or train it again"
        )
    return matrix


def linear_moment(statistics: Sums | None, source: LinearMap, *, floor: float = FLOOR) -> np.ndarray | None:
    """Return the moment that weighs a map's errors, `[1, in, in]`, or None where nothing is known.

    Args:
        statistics: of the model, None without calibration.
        source: the map.
        floor: for directions that were never seen, see `solvers.second_moment`.
    """
    found = None if statistics is None else statistics.inputs(source.index, source.reads)
    if found is None or not found.tokens:
        return None
    return expert_moments(found.sums[None], np.array([found.tokens]), floor=floor)


def linear_evidence(statistics: Sums | None, source: LinearMap) -> tuple[Evidence, list[Outcome]]:
    """Return what a fit of a map may use beside its matrix, and what the user should know about that."""
    moment = linear_moment(statistics, source)
    if statistics is None or moment is not None:
        return Evidence(target=source.name, moment=moment), []
    detail = (
        f"the statistics keep no second moments of what it reads, as `jaxmoe calibrate --targets {source.target}` does:"
        " it is fitted unweighted"
    )
    return Evidence(target=source.name), [Outcome("unweighted", source.name, detail)]


def describe_linear(name: str, linear: CompressedLinear) -> dict[str, Any]:
    """Return what plans and reports say of what is stored of a map, as `plan.describe` does of a projection."""
    numbers, size = linear.count()
    return {
        "terms": [{"target": name, **term.spec()} for term in linear.terms],
        "ranks": [term.rank for term in linear.terms],
        "parameters": numbers,
        "kept": numbers / linear.sizes.numbers,
        "bits_per_weight": 8 * size / linear.sizes.numbers,
    }


def measured_linear(matrix: np.ndarray, linear: CompressedLinear, moment: np.ndarray | None) -> dict[str, Any]:
    """Return what a report says of a map's errors.

    Args:
        matrix: as it was, `[out, in]`.
        linear: what is stored instead.
        moment: what weighs the errors, without a floor; None where nothing is known.
    """
    weighted = None if moment is None else linear_error(matrix, linear, moment=moment)
    return {"error": linear_error(matrix, linear), "weighted_error": weighted}
