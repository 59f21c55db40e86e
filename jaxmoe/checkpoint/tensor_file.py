"""Read and write safetensors files: an 8-byte length, a JSON header, the tensors' bytes.

Reading takes one tensor, or some of its rows, in every dtype of the format that numpy and ml_dtypes know; four-bit
values stay packed, two to a byte. Writing streams: the header follows from shapes that are known beforehand, then the
tensors are produced one at a time. Neither ever holds a file in memory, and no other code of jaxmoe opens such files.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from jaxmoe.checkpoint.atomic import atomic_file
from jaxmoe.checkpoint.records import open_regular, unreadable
from jaxmoe.checkpoint.shard import Shard
from jaxmoe.errors import JaxmoeError

DTYPES: dict[str, np.dtype] = {
    code: np.dtype(dtype)
    for code, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "C64": np.complex64,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
"""The format's dtype codes whose elements are whole bytes."""

PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""The codes whose elements are not: their tensors are read and written as bytes, `shape` counts elements."""

CODES = {dtype: code for code, dtype in DTYPES.items()}

# The limit that the format's reference implementation sets.
_HEADER_LIMIT = 100_000_000
_CHUNK = 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class TensorEntry:
    """A tensor in a file.

    Args:
        name: as the header has it.
        shard: the file where it lies.
        dtype: the format's code.
        shape: in elements.
        begin: offset of its first byte from the start of the file.
        end: offset behind its last byte.
    """

    name: str
    shard: Shard
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def file(self) -> Path:
        """Where it lies."""
        return self.shard.path

    @property
    def numbers(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.end - self.begin

    @property
    def code(self) -> str:
        """The format's code of the dtype."""
        return self.dtype

    @property
    def parts(self) -> "tuple[TensorEntry, ...]":
        """The tensors on disk that hold it: itself."""
        return (self,)

    def read(self, index: Any = ...) -> np.ndarray:
        """Return the values, or those at a number or a slice of the first axis, of which no others are read.

        The array is read-only, and starts at a boundary from which XLA takes it without a copy. Of packed dtypes all
        bytes are returned, flat.

        Raises:
            JaxmoeError: the file was changed since it was opened, or cannot be read.
        """
        if self.dtype in PACKED_BITS:
            return self.shard.read(self.begin, self.end)[index]
        if index is ...:
            return self.shard.read(self.begin, self.end).view(DTYPES[self.dtype]).reshape(self.shape)
        chosen = range(self.shape[0])[index]
        if isinstance(chosen, int):
            return self.read(slice(chosen, chosen + 1))[0]
        if chosen.step != 1:
            return self.read()[index]
        row = self.bytes // max(1, self.shape[0])
        span = self.shard.read(self.begin + chosen.start * row, self.begin + (chosen.start + len(chosen)) * row)
        return span.view(DTYPES[self.dtype]).reshape(len(chosen), *self.shape[1:])

    def abstract(self) -> np.ndarray:
        """Return ones of the tensor's shape and dtype, which any scale may be: without memory, and without reading."""
        return np.broadcast_to(np.ones((), DTYPES.get(self.dtype, np.uint8)), self.shape)


def byte_size(code: str, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor takes on disk.

    Example:
        >>> byte_size("BF16", (3, 5)), byte_size("F4", (3, 4))
        (30, 6)
    """
    bits = PACKED_BITS.get(code) or 8 * DTYPES[code].itemsize
    return -(-prod(shape) * bits // 8)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file in the order of their bytes.

    Raises:
        JaxmoeError: if the file is missing, truncated or not what the format asks for; all wrong tensors are listed.
    """
    header, shard = _parse(Path(path))
    start, size = shard.data, shard.size
    problems: list[str] = []
    entries: list[TensorEntry] = []
    for name, record in header.items():
        if name == "__metadata__":
            continue
        problem = _problem(record, size - start)
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        begin, end = record["data_offsets"]
        entries.append(TensorEntry(name, shard, record["dtype"], tuple(record["shape"]), start + begin, start + end))
    if not problems:
        entries.sort(key=lambda entry: (entry.begin, entry.end))
        position = start
        for entry in entries:
            if entry.begin != position:
                kind = "overlap" if entry.begin < position else "leave a hole"
                problems.append(f"{entry.name}: its bytes {kind} at offset {min(entry.begin, position) - start}")
            position = max(position, entry.end)
        if position != size and not problems:
            problems.append(f"{size - position} bytes behind the last tensor belong to none")
    if problems:
        raise JaxmoeError(f"{path} is corrupt: fetch it again. {listing(problems)}")
    return {entry.name: entry for entry in entries}


def file_metadata(shard: Shard) -> dict[str, str]:
    """Return a file's `__metadata__`, empty if it has none."""
    return json.loads(bytes(shard.read(8, shard.data))).get("__metadata__") or {}


def listing(items: Sequence[str], limit: int = 20) -> str:
    """Join what is wrong into one line; of very long lists the first ones and how many more there are.

    Example:
        >>> listing(["a", "b", "c"], limit=2)
        'a; b; and 1 more'
    """
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return "; ".join([*items[:limit], *more])


def _parse(path: Path) -> tuple[dict[str, Any], Shard]:
    """Return the header of a file, and the file as it is."""
    with open_regular(path) as file:
        try:
            status = os.fstat(file.fileno())
            size = status.st_size
            prefix = file.read(8)
            if prefix == b"version ":
                raise JaxmoeError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder")
            if len(prefix) < 8:
                raise JaxmoeError(f"{path} is truncated: {size} bytes do not hold a safetensors header; fetch it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, _HEADER_LIMIT):
                raise JaxmoeError(
                    f"{path} is truncated or not a safetensors file: it names a header of {length} bytes and has"
                    f" {size - 8} behind the length field; fetch it again"
                )
            text = file.read(length)
        except OSError as error:
            raise unreadable(path, error) from None
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError(f"a {type(header).__name__}")
        if text.count(b'"dtype"') != len(header) - ("__metadata__" in header):
            # Some name may stand twice, and JSON would keep the last: look closely, at three times the cost.
            json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise JaxmoeError(f"{path} is corrupt: its header is no JSON object ({error}); fetch it again") from error
    return header, Shard(path, size, status.st_mtime_ns, 8 + length)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"names occur twice: {listing(sorted({n for n in names if names.count(n) > 1}))}")
    return record


def _problem(record: Any, data_size: int) -> str | None:
    """Return what is wrong with one tensor's record, or None."""
    try:
        code, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    except (KeyError, TypeError):
        return "its record lacks dtype, shape or data_offsets"
    if not isinstance(code, str) or (code not in DTYPES and code not in PACKED_BITS):
        return f"unknown dtype {code!r}"
    if type(shape) is not list or not {*map(type, shape)} <= {int} or min(shape, default=0) < 0:
        return f"shape {shape!r} is not a list of sizes"
    if type(offsets) is not list or len(offsets) != 2 or {*map(type, offsets)} != {int}:
        return f"data_offsets {offsets!r} are not two numbers"
    begin, end = offsets
    if not 0 <= begin <= end <= data_size:
        return f"its bytes {begin} to {end} lie outside the {data_size} bytes of data"
    if end - begin != byte_size(code, shape):
        return f"{end - begin} bytes do not fit dtype {code} and shape {shape}"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """A tensor to be written: what is known beforehand, and how to get its values.

    Args:
        name: of the tensor.
        dtype: a numpy dtype or a code of the format.
        shape: in elements.
        produce: returns the values in just that dtype and shape; packed dtypes as bytes. Called once.
        stands_for: how many numbers of a model it holds, where these are others than its elements: of the parts of a
            quantised matrix, one stands for all of them.
    """

    name: str
    dtype: Any
    shape: tuple[int, ...]
    produce: Callable[[], np.ndarray]
    stands_for: int | None = None

    @property
    def code(self) -> str:
        """The format's code of the dtype."""
        if isinstance(self.dtype, str) and (self.dtype in DTYPES or self.dtype in PACKED_BITS):
            return self.dtype
        try:
            return CODES[np.dtype(self.dtype)]
        except (KeyError, TypeError):
            raise JaxmoeError(f"{self.name}: dtype {self.dtype} cannot be stored in safetensors") from None

    @property
    def numbers(self) -> int:
        """Elements, or what it stands for."""
        return prod(self.shape) if self.stands_for is None else self.stands_for

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return byte_size(self.code, self.shape)


Tensor = TypeVar("Tensor", TensorEntry, Planned)


def in_order(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in the order in which `write_tensors` writes them, wide dtypes first."""
    return sorted(tensors, key=lambda tensor: -DTYPES.get(tensor.code, np.dtype(np.uint8)).itemsize)


def write_tensors(path: Path, tensors: Sequence[Planned], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file, producing one tensor at a time.

    Wide dtypes come first, so that every tensor starts at a multiple of its element's size; within one dtype the given
    order stands. The same tensors give the same bytes.

    Args:
        path: the file's final name, under which it appears only when it is complete.
        tensors: what to write.
        metadata: the header's `__metadata__`; `{"format": "pt"}` by default, which transformers asks for.

    Returns:
        The SHA-256 of the file in hexadecimal digits, computed on the way.

    Raises:
        JaxmoeError: if two tensors have one name, or the disk is full or not writable.
        ValueError: if a produced array has another shape or dtype than planned.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> digest = write_tensors(path, [Planned("a", "float32", (2, 3), lambda: np.ones((2, 3), "float32"))])
        >>> read_header(path)["a"].read().sum()
        np.float32(6.0)
    """
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        raise JaxmoeError(f"{path}: written twice: {listing(sorted({n for n in names if names.count(n) > 1}))}")
    ordered = in_order(tensors)
    header: dict[str, Any] = {"__metadata__": metadata if metadata is not None else {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.bytes
        header[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_file(Path(path)) as file:
        for block in (struct.pack("<Q", len(text)), text):
            digest.update(block)
            file.write(block)
        for tensor in ordered:
            values = _contiguous_bytes(tensor)
            # In pieces: the digest and the disk then share what is still in the processor's cache.
            for begin in range(0, len(values), _CHUNK):
                block = values[begin : begin + _CHUNK].data
                digest.update(block)
                file.write(block)
            del values
    return digest.hexdigest()


def _contiguous_bytes(tensor: Planned) -> np.ndarray:
    """Return a planned tensor's values as a flat array of bytes."""
    values = np.asarray(tensor.produce())
    if tensor.code in PACKED_BITS:
        if values.dtype != np.uint8 or values.size != tensor.bytes:
            raise ValueError(f"{tensor.name}: {values.size} {values.dtype} for {tensor.bytes} packed bytes")
    elif values.dtype != DTYPES[tensor.code] or values.shape != tuple(tensor.shape):
        raise ValueError(
            f"{tensor.name}: produced {values.dtype} {values.shape}, planned {DTYPES[tensor.code]} {tensor.shape}"
        )
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
