"""FP8: values of eight bits with a scale for each block, row, column or matrix."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from jaxmoe.checkpoint.decoding import decode_fp8
from jaxmoe.checkpoint.quantization.matrix import Faults, Quantized
from jaxmoe.checkpoint.quantization.settings import groups
from jaxmoe.checkpoint.tensor_file import TensorEntry

FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALES = ("F32", "BF16", "F16", "F8_E8M0")


def fp8_matrix(
    own: str, name: str, tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any], faults: Faults
) -> Quantized | None:
    """Return the matrix that a tensor of scales belongs to; None where it belongs to none, or does not fit.

    Args:
        own: name of the matrix.
        name: of its scales.
        tensors: all on disk.
        settings: the config's, empty if it has none.
        faults: gets what is wrong.
    """
    weight, scale = tensors.get(own), tensors[name]
    if weight is None or weight.dtype not in FP8:
        if name.endswith("_scale_inv"):
            faults.damaged.append(f"{name} has no FP8 tensor {own}")
        return None
    declared = list(_declared_blocks(settings))
    grid = _grid(weight.shape, scale.shape)
    block = None if grid is None else _block(weight.shape, grid, declared)
    if grid is None or block is None or scale.dtype not in SCALES:
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
    for group in groups(settings):
        if group.weights.get("type", "float") == "float":
            found += [group.weights.get("block_structure"), (1, group.weights.get("group_size"))]
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
