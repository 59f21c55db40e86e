"""Relative errors of what a layer stores, as reports give them: plain, and weighted by what the experts see."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmoe.compression.evidence import LayerSums, moments
from jaxmoe.factors import CompressedLayer
from jaxmoe.factors.error import relative_errors


def measured_errors(
    read: Callable[[str], Any],
    layer: CompressedLayer,
    projection: str,
    sums: LayerSums | None,
    touched: bool = True,
) -> dict[str, Any]:
    """Return what a report says of one projection's errors; those that were not touched are known to be zero.

    Args:
        read: returns a projection's matrices as they were, `[expert, out, in]`.
        layer: what is stored instead.
        projection: `gate`, `up` or `down`.
        sums: what calibration says of the layer, None without.
        touched: whether anything was replaced.
    """
    errors = weighted = np.zeros(layer.sizes.experts)
    # As shrunk, but without the floor: what the calibration tokens lose.
    moment = moments(sums, projection, floor=0.0)
    if touched:
        weight = read(projection)
        errors = relative_errors(weight, layer, projection)
        weighted = relative_errors(weight, layer, projection, moment=moment)
    return {
        "error": float(errors.mean()),
        "worst_error": float(errors.max()),
        "worst_expert": int(errors.argmax()),
        "weighted_error": None if moment is None else float(weighted.mean()),
    }
