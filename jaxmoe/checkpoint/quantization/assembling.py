"""Put the tensors of a checkpoint together to matrices, and refuse what is damaged or of a scheme that is not read."""

import re
from collections.abc import Mapping
from typing import Any

from jaxmoe.checkpoint.formats import format_name, leftovers, tools
from jaxmoe.checkpoint.quantization.fp8 import FP8, fp8_matrix
from jaxmoe.checkpoint.quantization.integers import integer_matrix
from jaxmoe.checkpoint.quantization.matrix import Faults, Matrix
from jaxmoe.checkpoint.quantization.mxfp4 import mxfp4_matrix
from jaxmoe.checkpoint.quantization.settings import quantization_config
from jaxmoe.checkpoint.tensor_file import TensorEntry, listing
from jaxmoe.errors import JaxmoeError

_BUILDERS = {
    "_scale_inv": fp8_matrix,
    "_scale": fp8_matrix,
    "_blocks": mxfp4_matrix,
    "_packed": integer_matrix,
}
"""By what the name of one part of a quantised matrix ends with: without it, the rest is the matrix's own name."""

_OF_ACTIVATIONS = re.compile(r"[._](?:input_scale|input_scale_ub|activation_scale|output_scale|[qkv]_scale|kv_scale)$")


def assemble(tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, Matrix]:
    """Return a checkpoint's matrices by the names that they have without quantisation, in the order of the tensors.

    Args:
        tensors: all tensors on disk.
        config: of the checkpoint, for its `quantization_config`.

    Raises:
        JaxmoeError: if parts are missing or do not fit, or the scheme is none of the three; all offenders are listed.
    """
    settings = quantization_config(config)
    matrices: dict[str, Matrix] = {}
    taken: set[str] = set()
    faults = Faults([], [])
    for name in tensors:
        for suffix, build in _BUILDERS.items():
            if name.endswith(suffix):
                own = name[: -len(suffix)]
                matrix = build(own, name, tensors, settings, faults)
                if matrix is not None:
                    matrices[own] = matrix
                    taken.update(part.name for part in matrix.parts)
    if any(matrix.parts[0].dtype in FP8 for matrix in matrices.values()):
        taken.update(name for name in tensors if _OF_ACTIVATIONS.search(name))
    rest = {name: entry for name, entry in tensors.items() if name not in taken}
    faults.damaged.extend(
        f"{name} ({entry.dtype}) has no scale"
        for name, entry in rest.items()
        if entry.dtype in FP8 and not name.endswith("scale")
    )
    if not faults.damaged:
        faults.unread.extend(leftovers(rest, settings))
    if faults.damaged or faults.unread:
        raise JaxmoeError(_refusal(faults, format_name(tensors if faults.damaged else rest, settings)))
    return rest | matrices


def _refusal(faults: Faults, kind: str) -> str:
    begin, end = f"the weights are quantised as {kind} in a way that is not read", ""
    if faults.damaged:
        begin, end = f"the weights are quantised as {kind}, and do not fit", ", or fetch it again if files are missing"
    return (
        f"{begin}: take the checkpoint in bfloat16 or float32 that this one was made from{tools(kind)}{end}. Read are"
        " FP8 with a scale for each block, row or matrix, MXFP4 as in gpt-oss, and pack-quantized integers of 2 to 8"
        " bits."
        f" {listing(faults.damaged or faults.unread, 8)}"
    )
