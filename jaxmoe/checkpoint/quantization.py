"""Quantised checkpoints: which tensors together stand for a matrix, and its exact values in bfloat16.

Three schemes are read:

    FP8      `weight` (E4M3 or E5M2) and `weight_scale` or `weight_scale_inv`, which are the same: one scale for every
             block of rows and columns (at the lower and right edge blocks may be smaller), row or matrix. Also as
             ModelOpt keeps scales of blocks, `[row block, 1, column block, 1]`. Scales of activations are dropped.
    MXFP4    `_blocks` (two E2M1 values per byte, the low half first) and `_scales` (a power of two for every 32
             inputs), as in gpt-oss, whose matrices are `[expert, in, out]` once they are read
    int4     `weight_packed` (eight values plus 8 per int32, low bits first), `weight_scale` per group of inputs and
             `weight_shape`: the symmetric "pack-quantized" format of compressed-tensors

Everything else is refused under the name of its format (`formats.py`). Nothing is quantised here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxmoe.checkpoint.decoding import decode_fp8, decode_int4, decode_mxfp4
from jaxmoe.checkpoint.formats import format_name, leftovers, tools
from jaxmoe.checkpoint.tensor_file import TensorEntry, listing
from jaxmoe.errors import JaxmoeError

SUFFIXES = {
    "_scale_inv": "fp8",
    "_scale": "fp8",
    "_blocks": "mxfp4",
    "_packed": "int4",
}
"""What the name of one part of a quantised matrix ends with; without it, the rest is the matrix's own name."""

RECORDS = ("quantization_config", "compression_config", "quantization")
"""The keys of a config under which it says how its weights are quantised; the last one is MLX's."""

_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_OF_ACTIVATIONS = re.compile(r"[._](?:input_scale|input_scale_ub|activation_scale|output_scale|[qkv]_scale|kv_scale)$")


@runtime_checkable
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
        parts: the tensors on disk.
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
        # One scale may serve all experts.
        each = (part.shape[:1] == self.shape[:1] for part in self.parts)
        return self.decode(*(part.read(index if own else ...) for part, own in zip(self.parts, each, strict=True)))


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
    faults = _Faults([], [])
    for name in tensors:
        for suffix, scheme in SUFFIXES.items():
            if name.endswith(suffix):
                own = name[: -len(suffix)]
                matrix = _BUILDERS[scheme](own, name, tensors, settings, faults)
                if matrix is not None:
                    matrices[own] = matrix
                    taken.update(part.name for part in matrix.parts)
    if any(matrix.parts[0].dtype in _FP8 for matrix in matrices.values()):
        taken.update(name for name in tensors if _OF_ACTIVATIONS.search(name))
    rest = {name: entry for name, entry in tensors.items() if name not in taken}
    faults.damaged.extend(
        f"{name} ({entry.dtype}) has no scale"
        for name, entry in rest.items()
        if entry.dtype in _FP8 and not name.endswith("scale")
    )
    if not faults.damaged:
        faults.unread.extend(leftovers(rest, settings))
    if faults.damaged or faults.unread:
        raise JaxmoeError(_refusal(faults, format_name(tensors if faults.damaged else rest, settings)))
    return rest | matrices


class _Faults(NamedTuple):
    """What is wrong with weights in a scheme that is read, and what is of another one."""

    damaged: list[str]
    unread: list[str]


def _refusal(faults: _Faults, kind: str) -> str:
    begin, end = f"the weights are quantised as {kind} in a way that is not read", ""
    if faults.damaged:
        begin, end = f"the weights are quantised as {kind}, and do not fit", ", or fetch it again if files are missing"
    return (
        f"{begin}: take the checkpoint in bfloat16 or float32 that this one was made from{tools(kind)}{end}. Read are"
        " FP8 with a scale for each block, row or matrix, MXFP4 as in gpt-oss, and symmetric int4 pack-quantized."
        f" {listing(faults.damaged or faults.unread, 8)}"
    )


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantisation settings of a config, wherever they stand in it; empty if there are none.

    Example:
        >>> quantization_config({"text_config": {"quantization_config": {"quant_method": "fp8"}}})
        {'quant_method': 'fp8'}
    """
    for key in RECORDS:
        if isinstance(config.get(key), Mapping):
            return config[key]
    found = (quantization_config(value) for value in config.values() if isinstance(value, Mapping))
    return next(filter(None, found), {})


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without quantisation settings, in the original order of keys.

    Example:
        >>> without_quantization({"a": 1, "text_config": {"b": 2, "quantization_config": {"quant_method": "fp8"}}})
        {'a': 1, 'text_config': {'b': 2}}
    """
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in RECORDS or not isinstance(value, Mapping | None)
    }


def _fp8(own, name, tensors, settings, faults) -> Quantized | None:
    weight, scale = tensors.get(own), tensors[name]
    if weight is None or weight.dtype not in _FP8:
        if name.endswith("_scale_inv"):
            faults.damaged.append(f"{name} has no FP8 tensor {own}")
        return None
    declared = list(_declared_blocks(settings))
    grid = _grid(weight.shape, scale.shape)
    block = None if grid is None else _block(weight.shape, grid, declared)
    if grid is None or block is None or scale.dtype not in _SCALES:
        blocks = f"blocks of {' or '.join(f'{rows}x{columns}' for rows, columns in declared)} of " if declared else ""
        faults.damaged.append(
            f"{name} {scale.dtype} {list(scale.shape)} does not fit {blocks}{own} {list(weight.shape)}"
        )
        return None

    def decode(values, scales):
        leading = () if scales.size == 1 else values.shape[:-2]
        return decode_fp8(values, scales.reshape(*leading, *grid[-2:]), block)

    return Quantized(own, weight.shape, (weight, scale), decode, stacked=len(weight.shape) == 3)


def _declared_blocks(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the blocks that the settings name, `(rows, columns)`."""
    found = [settings.get("weight_block_size")]
    for own in _weights(settings):
        found += [own.get("block_structure"), (1, own.get("group_size"))]
    for block in found:
        if (
            isinstance(block, list | tuple)
            and len(block) == 2
            and all(type(size) is int and size > 0 for size in block)
        ):
            yield block[0], block[1]


def _grid(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of scales with as many axes as the weights have; None if they cannot be told."""
    if len(weight) < 2 or 0 in weight:
        return None
    ones = (1,) * len(weight)
    if prod(scale) == 1:
        return ones
    if len(scale) == len(weight) + 2 and scale[-3] == scale[-1] == 1:
        scale = (*scale[:-3], scale[-2])
    if scale in (weight[:-1], weight[:-2]):
        scale = (*scale, *ones[len(scale) :])
    return scale if len(scale) == len(weight) and scale[:-2] == weight[:-2] else None


def _block(weight: tuple[int, ...], grid: tuple[int, ...], declared: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, None if the scales do not fit."""
    (rows, columns), (down, across) = weight[-2:], grid[-2:]
    for block in declared or [(128, 128)]:
        if (down, across) == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    # A scale for each matrix, row or column, whatever blocks are declared; otherwise what divides evenly.
    alone = (down, across) in ((1, 1), (rows, 1), (1, columns))
    if (declared and not alone) or 0 in (down, across) or rows % down or columns % across:
        return None
    return rows // down, columns // across


def _weights(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what compressed-tensors says of the weights, group by group."""
    groups = settings.get("config_groups")
    named = groups.values() if isinstance(groups, Mapping) else ()
    found = [group.get("weights") for group in named if isinstance(group, Mapping)]
    return [weights for weights in found if isinstance(weights, Mapping)]


def _mxfp4(own, name, tensors, settings, faults) -> Quantized | None:
    blocks, scales = tensors[name], tensors.get(own + "_scales")
    if scales is None or blocks.dtype != "U8" or scales.dtype != "U8":
        if blocks.dtype == "U8":
            faults.damaged.append(f"{blocks.name} has no U8 tensor {own}_scales")
        return None
    if len(blocks.shape) != 4 or blocks.shape[3] != 16 or scales.shape != blocks.shape[:3]:
        faults.damaged.append(f"{blocks.name} {list(blocks.shape)} does not fit {scales.name} {list(scales.shape)}")
        return None
    experts, out, groups, _ = blocks.shape
    return Quantized(own, (experts, 32 * groups, out), (blocks, scales), decode_mxfp4, stacked=True)


def _int4(own, name, tensors, settings, faults) -> Quantized | None:
    packed = tensors[name]
    if packed.dtype != "I32":
        return None
    parts = (tensors.get(own + "_scale"), tensors.get(own + "_shape"))
    further = [own + end for end in ("_zero_point", "_g_idx") if own + end in tensors]
    if None in parts or further:
        ought = f"stands beside {' and '.join(further)}" if further else f"lacks {own}_scale or {own}_shape"
        (faults.unread if further else faults.damaged).append(f"{name} {ought}")
        return None
    for weights in _weights(settings):
        if weights.get("num_bits", 4) != 4 or weights.get("type", "int") != "int" or not weights.get("symmetric", True):
            faults.unread.append(f"config_groups in config.json: {weights} is not symmetric 4-bit integer")
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
    faults.damaged.append(f"{packed.name} {list(size)} does not fit {scale.name} {list(scale.shape)}")
    return None


_BUILDERS = {"fp8": _fp8, "mxfp4": _mxfp4, "int4": _int4}
