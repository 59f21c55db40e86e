"""Integers of 2 to 8 bits as compressed-tensors packs them: the format "pack-quantized".

    weight_packed      int32 [out, ceil(in * bits / 32)]     of each row one stream of bits, the low ones first
    weight_scale       float [out, in / group]               one for each group of a row, or for each row
    weight_zero_point  int32 [ceil(out * bits / 32), in / group]   codes of zero, packed along the rows, if asymmetric
    weight_shape       int   [2]                             out, in

How many bits, which groups and whether there are zeros is said in config.json, for each of its groups of modules; the
tensors have to agree. compressed-tensors before 0.20 packed whole codes into each int32, which for 3, 5, 6 and 7 bits
is another format; it is not read.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.checkpoint.decoding import decode_integers
from jaxmoe.checkpoint.quantization.matrix import Faults, Quantized
from jaxmoe.checkpoint.quantization.settings import Group, group_of, groups, ignored
from jaxmoe.checkpoint.tensor_file import TensorEntry
from jaxmoe.errors import JaxmoeError

BITS = range(2, 9)
"""Widths of codes that are read."""

SCALES = ("F32", "BF16", "F16")


class _Scheme(NamedTuple):
    """What the config says: bits of a code, inputs of a group (0: a row; None: unknown), whether there are no zeros."""

    bits: int
    group: int | None
    symmetric: bool


def integer_matrix(
    own: str, name: str, tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any], faults: Faults
) -> Quantized | None:
    """Return the matrix that packed integers stand for; None where it is none, or does not fit.

    Args:
        own: name of the matrix.
        name: of the packed integers.
        tensors: all on disk.
        settings: the config's, empty if it has none.
        faults: gets what is wrong.
    """
    packed = tensors[name]
    if packed.dtype != "I32":
        return None
    scale, shape = tensors.get(own + "_scale"), tensors.get(own + "_shape")
    if scale is None or shape is None:
        faults.damaged.append(f"{name} lacks {own}_scale or {own}_shape")
        return None
    if own in tensors:
        faults.damaged.append(f"{name} stands beside {own}: one of them alone can be the matrix")
        return None
    if own + "_g_idx" in tensors:
        faults.unread.append(f"{name} stands beside {own}_g_idx: its columns are in another order")
        return None
    zero = tensors.get(own + "_zero_point")
    try:
        found = _scheme(own, packed, shape, zero, settings, faults)
    except JaxmoeError as error:
        faults.damaged.append(f"{name}: {error}")
        return None
    if found is None:
        return None
    if problem := _problem(found, packed, scale, zero, shape):
        faults.damaged.append(problem)
        return None
    columns = _columns(found, scale, shape)
    parts = (packed, scale, shape) if zero is None else (packed, scale, shape, zero)
    decode = partial(_decode, packed.name, shape.name, (packed.shape[0], columns), found.bits)
    return Quantized(own, (packed.shape[0], columns), parts, decode)


def _scheme(
    own: str,
    packed: TensorEntry,
    shape: TensorEntry,
    zero: TensorEntry | None,
    settings: Mapping[str, Any],
    faults: Faults,
) -> _Scheme | None:
    """Return what the config says of a matrix; where it says nothing, what the tensors do."""
    module = own.removesuffix(".weight")
    if ignored(module, settings):
        raise JaxmoeError(f"config.json says under `ignore` that {module} is not quantised")
    if not groups(settings):
        columns = _pair(shape)[1]
        fitting = [bits for bits in BITS if len(packed.shape) == 2 and packed.shape[1] == -(-columns * bits // 32)]
        if len(fitting) != 1:
            raise JaxmoeError("config.json does not say how many bits a code has, and the sizes do not tell")
        return _Scheme(fitting[0], None, zero is None)
    group = group_of(module, settings)
    if group is None:
        raise JaxmoeError("no group of config_groups in config.json has it among its targets")
    weights = group.weights
    bits, size, symmetric = weights.get("num_bits", 8), weights.get("group_size"), weights.get("symmetric", True)
    strategy = weights.get("strategy") or ("group" if type(size) is int and size > 0 else "channel")
    if weights.get("type", "int") != "int" or type(bits) is not int or bits not in BITS:
        faults.unread.append(f"{packed.name}: {_said(group)}, {weights} is not of integers of 2 to 8 bits")
    elif strategy not in ("group", "channel") or (strategy == "group" and not (type(size) is int and size > 0)):
        faults.unread.append(
            f"{packed.name}: {_said(group)}, strategy {strategy!r} of group_size {size!r} is neither of groups nor rows"
        )
    elif type(symmetric) is not bool:
        faults.unread.append(f"{packed.name}: {_said(group)}, symmetric {symmetric!r}")
    else:
        return _Scheme(bits, size if strategy == "group" else 0, symmetric)
    return None


def _said(group: Group) -> str:
    return f"config_groups in config.json, {group.name}"


def _problem(
    found: _Scheme, packed: TensorEntry, scale: TensorEntry, zero: TensorEntry | None, shape: TensorEntry
) -> str | None:
    """Return where the tensors contradict one another or the config, None where they do not."""
    name, size = packed.name, packed.shape
    if len(size) != 2 or len(scale.shape) != 2 or 0 in (*size, *scale.shape) or scale.shape[0] != size[0]:
        return f"{name} {list(size)} does not fit {scale.name} {list(scale.shape)}"
    if scale.dtype not in SCALES:
        return f"{scale.name} is {scale.dtype}, not {', '.join(SCALES)}"
    if shape.numbers != 2 or shape.dtype not in ("I64", "I32"):
        return f"{shape.name} is {shape.dtype} {list(shape.shape)}, not the two sizes of the matrix"
    count = scale.shape[1]
    if found.group == 0 and count != 1:
        return f"{scale.name} {list(scale.shape)}: config.json says that each row has one scale (strategy 'channel')"
    columns = _columns(found, scale, shape)
    if columns < 1 or columns % count:
        return f"{scale.name} {list(scale.shape)} does not fit {columns} columns, of which {shape.name} tells"
    if size[1] != -(-columns * found.bits // 32):
        whole = 32 // found.bits
        if size[1] == -(-columns // whole):
            return (
                f"{name} {list(size)} is packed as compressed-tensors before 0.20 does it, {whole} codes of"
                f" {found.bits} bits in each int32: write it again with a newer one"
            )
        return (
            f"{name} {list(size)}: {columns} columns of {found.bits} bits, of which {scale.name} {list(scale.shape)}"
            f" and config.json tell, take {-(-columns * found.bits // 32)} int32"
        )
    if found.symmetric is (zero is not None):
        said = "symmetric" if found.symmetric else "not symmetric"
        return f"{name}: config.json says {said}, and {'there is ' + zero.name if zero else 'it has no zero points'}"
    if zero is not None and (zero.dtype != "I32" or zero.shape != (-(-size[0] * found.bits // 32), count)):
        return (
            f"{zero.name} {zero.dtype} {list(zero.shape)} does not fit {scale.name} {list(scale.shape)}: {found.bits}"
            f" bits for each, packed along the rows, are I32 [{-(-size[0] * found.bits // 32)}, {count}]"
        )
    return None


def _columns(found: _Scheme, scale: TensorEntry, shape: TensorEntry) -> int:
    """Return the columns of a matrix."""
    # Read from the disk only where the scales do not tell: one more page per expert is slow on a large checkpoint.
    return scale.shape[1] * found.group if found.group else _pair(shape)[1]


def _pair(shape: TensorEntry) -> tuple[int, int]:
    """Return the sizes that a tensor tells of."""
    values = shape.read().reshape(-1)
    if values.size != 2 or values.dtype.kind != "i":
        raise JaxmoeError(f"{shape.name} is {shape.dtype} {list(shape.shape)}, not the two sizes of the matrix")
    return int(values[0]), int(values[1])


def _decode(
    packed_name: str,
    shape_name: str,
    sizes: tuple[int, int],
    bits: int,
    packed: np.ndarray,
    scale: np.ndarray,
    shape: np.ndarray,
    zero: np.ndarray | None = None,
) -> np.ndarray:
    """Return the values, or raise where the sizes on disk are others than the headers tell."""
    if tuple(shape.reshape(-1).tolist()) != sizes:
        raise JaxmoeError(
            f"{shape_name} says {shape.reshape(-1).tolist()}, and by its scales and config.json {packed_name} holds"
            f" {list(sizes)}: fetch the checkpoint again, or mend what changed it"
        )
    return decode_integers(packed, scale, bits, sizes[1], zero)
