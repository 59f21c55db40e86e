"""The exact values of quantised matrices, from their parts.

Products are formed in float32 and rounded once to bfloat16. Each scheme is decoded bit for bit as its reference
implementation does it; `quantization.py` says which there are.
"""

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ROWS = 128


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


def decode_int4(packed: np.ndarray, scale: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Return the matrix of packed signed four-bit integers times the scale of their group, in bfloat16.

    Args:
        packed: `[out, ceil(in / 8)]` int32.
        scale: `[out, group]`; the inputs are split evenly over the groups.
        shape: `(out, in)`.

    Example:
        >>> packed, scale = np.array([[0x76543218]], "int32"), np.full((1, 1), 2, "float32")
        >>> decode_int4(packed, scale, np.array([1, 8]))[0].astype(int)
        array([  0, -14, -12, -10,  -8,  -6,  -4,  -2])
    """
    rows, columns = (int(size) for size in shape)
    # Bytes in memory run from the low bits to the high ones, so that a byte holds two neighbours.
    octets = np.ascontiguousarray(packed).view(np.uint8)
    values = np.empty((rows, 2 * octets.shape[1]), np.int8)
    values[:, 0::2] = octets & 15
    values[:, 1::2] = octets >> 4
    values -= 8
    groups = scale.shape[1]
    grouped = values[:, :columns].reshape(rows, groups, -1)
    return (grouped * scale.astype(np.float32)[..., None]).astype(BFLOAT16).reshape(rows, columns)
