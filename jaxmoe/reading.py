"""A target's matrices as a fit reads them: float32, aligned, finite."""

from math import prod

import numpy as np

from jaxmoe.checkpoint import Checkpoint, MoELayer
from jaxmoe.checkpoint.shard import aligned_bytes
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS


def read_target(checkpoint: Checkpoint, layer: MoELayer, target: str) -> np.ndarray:
    """Return a target's matrices in float32, `[expert, out, in]`, holding one projection beside them at most.

    Raises:
        JaxmoeError: a weight is NaN or infinite; the message names the tensors.
    """
    shape = layer.shape.of(target)
    weight = aligned_bytes(4 * prod(shape)).view(np.float32).reshape(shape)
    start = 0
    for projection in TARGETS[target]:
        part = checkpoint.projection(layer, projection)
        weight[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    if not np.isfinite(weight).all():
        raise JaxmoeError(_not_finite(checkpoint, layer, target))
    return weight


def _not_finite(checkpoint: Checkpoint, layer: MoELayer, target: str) -> str:
    named = []
    for name in layer.names:
        entry = checkpoint.tensors[name]
        values = entry.read()
        if values.dtype.kind not in "iu" and not np.isfinite(values.astype(np.float32)).all():
            named.append(f"{name} in {entry.file}")
    where = "; ".join(named[:8]) or f"layer {layer.index}, {target}"
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return f"NaN or infinite weights in {where}{more}: the checkpoint is damaged, fetch or train it again"
