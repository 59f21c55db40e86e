"""Quantised checkpoints: which tensors together stand for a matrix, and its exact values in bfloat16.

Three schemes are read:

    FP8        `weight` (E4M3 or E5M2) and `weight_scale` or `weight_scale_inv`, which are the same: one scale for every
               block of rows and columns (at the lower and right edge blocks may be smaller), row or matrix. Also as
               ModelOpt keeps scales of blocks, `[row block, 1, column block, 1]`. Scales of activations are dropped.
    MXFP4      `_blocks` (two E2M1 values per byte, the low half first) and `_scales` (a power of two for every 32
               inputs), as in gpt-oss, whose matrices are `[expert, in, out]` once they are read
    integers   `weight_packed` (codes of 2 to 8 bits, of each row one stream of bits), `weight_scale` of each row or
               group of its inputs, `weight_shape`, and `weight_zero_point` where the codes' zeros differ: the format
               "pack-quantized" of compressed-tensors

Everything else is refused under the name of its format (`formats.py`). Nothing is quantised here. What no step replaces
may be written again as it lies (`keeping.py`).
"""

from jaxmoe.checkpoint.quantization.assembling import assemble
from jaxmoe.checkpoint.quantization.keeping import leaving_out, obstacle
from jaxmoe.checkpoint.quantization.matrix import Matrix, Quantized, as_stored
from jaxmoe.checkpoint.quantization.settings import quantization_config, without_quantization

__all__ = [
    "Matrix",
    "Quantized",
    "as_stored",
    "assemble",
    "leaving_out",
    "obstacle",
    "quantization_config",
    "without_quantization",
]
