"""Quantised checkpoints: which tensors together stand for a matrix, and its exact values in bfloat16.

Three schemes are read, each bit for bit as its reference implementation reads it:

    FP8      `weight` (E4M3 or E5M2) and `weight_scale_inv`, one scale for every block of 128x128; the blocks at the
             lower and right edge may be smaller
    MXFP4    `_blocks` (two E2M1 values per byte, the low half first) and `_scales` (a power of two for every 32
             inputs), as in gpt-oss, whose matrices are `[expert, in, out]` once they are read
    int4     `weight_packed` (eight values plus 8 per int32, low bits first), `weight_scale` per group of inputs and
             `weight_shape`: the symmetric "pack-quantized" format of compressed-tensors

Products are formed in float32 and rounded once. Nothing is quantised here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxmoe.checkpoint.tensor_file import TensorEntry, listing
from jaxmoe.errors import JaxmoeError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

SUFFIXES = {
    "_scale_inv": "fp8",
    "_blocks": "mxfp4",
    "_packed": "int4",
}
"""What the name of one part of a quantised matrix ends with; without it, the rest is the matrix's own name."""

_FP8 = ("F8_E4M3", "F8_E5M2")
_LEFTOVERS = (
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_g_idx",
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".absmax",
    ".input_scale",
    "_proj_blocks",
    "_proj_scales",
)
"""Endings that only quantised checkpoints have; one that stands alone belongs to no scheme that is read here."""


class Matrix(Protocol):
    """What the reader asks of a tensor, plain or quantised: `TensorEntry` and `Quantized` both answer."""

    @property
    def name(self) -> str:
        """Under which transformers would save it without quantisation."""
        ...

    @property
    def dtype(self) -> str:
        """Code of the dtype that `read` returns."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements, as `read` returns it."""
        ...

    @property
    def numbers(self) -> int:
        """Elements."""
        ...

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        """The tensors on disk."""
        ...

    def read(self, index: Any = ...) -> np.ndarray:
        """Return the values, or those at an index of the first axis."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A matrix that several tensors stand for.

    Args:
        name: under which transformers would save it without quantisation.
        shape: of the matrix.
        parts: the tensors on disk; all but the last take an index of the first axis.
        decode: computes the values from the parts' arrays.
        stacked: whether the first axis is that of the experts, so that one of them can be read alone.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorEntry, ...]
    decode: Callable[..., np.ndarray]
    stacked: bool = False
    dtype: str = "BF16"

    @property
    def numbers(self) -> int:
        """Elements of the matrix; scales do not count."""
        return prod(self.shape)

    def read(self, index: Any = ...) -> np.ndarray:
        """Return the values in bfloat16, or those at an index of the first axis."""
        if index is ...:
            return self.decode(*(part.read() for part in self.parts))
        if not self.stacked:
            return self.read()[index]
        return self.decode(*(part.read(index) for part in self.parts))


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
    wide = np.repeat(scale.astype(np.float32), block[1], axis=-1)[..., :columns]
    out = np.empty(weight.shape, BFLOAT16)
    for position, begin in enumerate(range(0, rows, block[0])):
        part = (..., slice(begin, begin + block[0]), slice(None))
        out[part] = table[weight[part].view(np.uint8)] * wide[..., position : position + 1, :]
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
    problems: list[str] = []
    for name in tensors:
        for suffix, scheme in SUFFIXES.items():
            if name.endswith(suffix):
                own = name[: -len(suffix)]
                matrix = _BUILDERS[scheme](own, tensors, settings, problems)
                if matrix is not None:
                    matrices[own] = matrix
                    taken.update(part.name for part in matrix.parts)
    matrices = {name: entry for name, entry in tensors.items() if name not in taken} | matrices
    if settings or matrices.keys() != tensors.keys():
        problems += [
            f"{name} ({entry.dtype}) belongs to no scheme that jaxmoe reads"
            for name, entry in tensors.items()
            if name not in taken and (name.endswith(_LEFTOVERS) or entry.dtype in _FP8) and not problems
        ]
    if problems:
        method = settings.get("quant_method")
        raise JaxmoeError(
            f"the checkpoint is quantised{f' with {method!r}' if method else ''} in a way that cannot be read exactly:"
            " jaxmoe reads FP8 with block scales, MXFP4 and int4 pack-quantized (symmetric); take the unquantised"
            f" checkpoint. {listing(problems)}"
        )
    return matrices


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantisation settings of a config, wherever they stand; empty if there are none."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(place.get(key), Mapping):
                return place[key]
    return {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its quantisation settings, in the original order of keys."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if isinstance(kept.get("text_config"), Mapping):
        kept["text_config"] = without_quantization(kept["text_config"])
    return kept


def _fp8(own, tensors, settings, problems) -> Quantized | None:
    weight, scale = tensors.get(own), tensors[own + "_scale_inv"]
    if weight is None or weight.dtype not in _FP8:
        problems.append(f"{scale.name} has no FP8 tensor {own}")
        return None
    block = tuple(settings.get("weight_block_size") or (128, 128))
    if len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        problems.append(f"weight_block_size {block!r} in config.json is not two sizes")
        return None
    grid = (*weight.shape[:-2], *(-(-size // b) for size, b in zip(weight.shape[-2:], block, strict=True)))
    if len(weight.shape) < 2 or scale.shape != grid or scale.dtype not in ("F32", "BF16", "F16", "F8_E8M0"):
        problems.append(
            f"{scale.name} {scale.dtype} {list(scale.shape)} does not fit blocks of {block[0]}x{block[1]} of"
            f" {own} {list(weight.shape)}"
        )
        return None

    def decode(values, scales):
        return decode_fp8(values, scales, block)

    return Quantized(own, weight.shape, (weight, scale), decode, stacked=len(weight.shape) == 3)


def _mxfp4(own, tensors, settings, problems) -> Quantized | None:
    blocks, scales = tensors[own + "_blocks"], tensors.get(own + "_scales")
    if scales is None or blocks.dtype != "U8" or scales.dtype != "U8":
        if blocks.dtype == "U8":
            problems.append(f"{blocks.name} has no U8 tensor {own}_scales")
        return None
    if len(blocks.shape) != 4 or blocks.shape[3] != 16 or scales.shape != blocks.shape[:3]:
        problems.append(f"{blocks.name} {list(blocks.shape)} does not fit {scales.name} {list(scales.shape)}")
        return None
    experts, out, groups, _ = blocks.shape
    return Quantized(own, (experts, 32 * groups, out), (blocks, scales), decode_mxfp4, stacked=True)


def _int4(own, tensors, settings, problems) -> Quantized | None:
    packed = tensors[own + "_packed"]
    parts = (tensors.get(own + "_scale"), tensors.get(own + "_shape"))
    if None in parts or packed.dtype != "I32" or own + "_zero_point" in tensors or own + "_g_idx" in tensors:
        problems.append(f"{packed.name} does not stand with just {own}_scale and {own}_shape")
        return None
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("num_bits", 4) != 4 or weights.get("type", "int") != "int" or not weights.get("symmetric", True):
            problems.append(f"config_groups in config.json: {weights} is not symmetric 4-bit integer")
            return None
    scale, shape = parts
    # Read from the disk only where padding hides it: one more page per expert is slow on a large checkpoint.
    size = packed.shape
    if len(size) == 2 and len(scale.shape) == 2 and shape.numbers == 2:
        columns = 8 * size[1]
        if scale.shape[1] == 0 or columns % scale.shape[1]:
            columns = int(shape.read()[1])
        whole = -(-columns // 8) == size[1] and scale.shape[0] == size[0] and columns % max(1, scale.shape[1]) == 0
        if whole:
            return Quantized(own, (size[0], columns), (packed, scale, shape), decode_int4)
    problems.append(f"{packed.name} {list(size)} does not fit {scale.name} {list(scale.shape)}")
    return None


_BUILDERS = {"fp8": _fp8, "mxfp4": _mxfp4, "int4": _int4}
