"""MXFP4 as gpt-oss has it: two E2M1 values in a byte, a power of two for every 32 inputs, all experts in one tensor."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.checkpoint.decoding import decode_mxfp4
from jaxmoe.checkpoint.quantization.matrix import Faults, Quantized
from jaxmoe.checkpoint.tensor_file import TensorEntry


def mxfp4_matrix(
    own: str, name: str, tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any], faults: Faults
) -> Quantized | None:
    """Return the matrices that a tensor of blocks holds; None where it is none, or does not fit.

    Args:
        own: name of the matrices.
        name: of their blocks.
        tensors: all on disk.
        settings: the config's, empty if it has none.
        faults: gets what is wrong.
    """
    blocks, scales = tensors[name], tensors.get(own + "_scales")
    if scales is None or blocks.dtype != "U8" or scales.dtype != "U8":
        if blocks.dtype == "U8":
            faults.damaged.append(f"{blocks.name} has no U8 tensor {own}_scales")
        return None
    if own in tensors:
        faults.damaged.append(f"{blocks.name} stands beside {own}: one of them alone can be the matrices")
        return None
    if len(blocks.shape) != 4 or blocks.shape[3] != 16 or scales.shape != blocks.shape[:3]:
        faults.damaged.append(f"{blocks.name} {list(blocks.shape)} does not fit {scales.name} {list(scales.shape)}")
        return None
    experts, out, groups, _ = blocks.shape
    return Quantized(own, (experts, 32 * groups, out), (blocks, scales), decode_mxfp4, stacked=True)
