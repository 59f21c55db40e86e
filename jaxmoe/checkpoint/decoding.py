"""The exact values of quantised matrices, from their parts.

Products are formed in float32 and rounded once to bfloat16. Each scheme is decoded bit for bit as its reference
implementation does it; `quantization.py` says which there are.
"""

import jax
import ml_dtypes
import numpy as np

from jaxmoe.factors.packing import unpack

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ROWS = 128
_unpack = jax.jit(unpack, static_argnums=(1, 2))


def decode_fp8(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """Return `weight * scale`, one scale for every block of rows and columns, in bfloat16.

    Args:
        weight: `[..., row, column]` in a float8 dtype.
        scale: `[..., ceil(row / block), ceil(column / block)]`.
        block: rows and columns of a block.

    Example:
        >>> weight = np.full((3, 4), 2, ml_dtypes.float8_e4m3fn)
        >>> decode_fp8(weight, np.array([[1, 10], [3, 30]], "float32"), (2, 2)).astype(int).tolist()
        [[2, 2, 20, 20], [2, 2, 20, 20], [6, 6, 60, 60]]
    """
    rows, columns = weight.shape[-2:]
    # A table of all 256 values: several times faster than converting element by element.
    table = np.arange(256, dtype=np.uint8).view(weight.dtype).astype(np.float32)
    wide = scale.astype(np.float32)
    if scale.shape[-1] > 1:
        wide = np.repeat(wide, block[1], axis=-1)[..., :columns]
    out = np.empty(weight.shape, BFLOAT16)
    # Some whole blocks at a time, so that little is held in float32.
    together = max(1, _ROWS // block[0])
    for position, begin in enumerate(range(0, rows, together * block[0])):
        part = weight[..., begin : begin + together * block[0], :]
        scales = wide[..., position * together : (position + 1) * together, :]
        if scales.shape[-2] > 1:
            scales = np.repeat(scales, block[0], axis=-2)[..., : part.shape[-2], :]
        out[..., begin : begin + part.shape[-2], :] = table[part.view(np.uint8)] * scales
    return out


_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_FP4_PAIRS = np.array([(_FP4_VALUES[byte & 15], _FP4_VALUES[byte >> 4]) for byte in range(256)], np.float32)


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the matrices of E2M1 values with shared exponents, `[..., in, out]`, in bfloat16.

    Args:
        blocks: `[..., out, group, 16]`, two values per byte, the low half first.
        scales: `[..., out, group]`, exponents plus 127.

    Example:
        >>> decode_mxfp4(np.full((1, 1, 16), 0x42, np.uint8), np.full((1, 1), 128, np.uint8))[:2].astype(float).tolist()
        [[2.0], [4.0]]
    """
    values = np.empty((*blocks.shape[:-1], 32), BFLOAT16)
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)
    for row in np.ndindex(blocks.shape[:-3]):
        pairs = _FP4_PAIRS[blocks[row]].reshape(values[row].shape)
        values[row] = pairs * powers[row][..., None]
    return values.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)


def decode_integers(
    packed: np.ndarray, scale: np.ndarray, bits: int, columns: int, zero: np.ndarray | None = None
) -> np.ndarray:
    """Return the matrix of packed integers times the scale of their group, in bfloat16.

    Args:
        packed: `[out, ceil(in * bits / 32)]` int32, of each row one stream of bits.
        scale: `[out, group]`; the inputs are split evenly over the groups.
        bits: of a code.
        columns: the inputs.
        zero: the codes of zero, `[ceil(out * bits / 32), group]` int32, packed along the rows; None for the middle one.

    Example:
        >>> packed, scale = np.array([[0x76543218]], "int32"), np.full((1, 1), 2, "float32")
        >>> decode_integers(packed, scale, 4, 8)[0].astype(int)
        array([  0, -14, -12, -10,  -8,  -6,  -4,  -2])
    """
    rows, groups = scale.shape
    codes = np.asarray(_unpack(packed, bits, columns)).reshape(rows, groups, -1).astype(np.int16)
    middle = 2 ** (bits - 1)
    codes -= middle if zero is None else np.asarray(_unpack(zero.T, bits, rows)).T[..., None].astype(np.int16)
    return (codes * scale.astype(np.float32)[..., None]).astype(BFLOAT16).reshape(rows, columns)
