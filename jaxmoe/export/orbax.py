"""A checkpoint as Orbax checkpoints, for programs of the JAX world, and back, bit for bit.

    OUTPUT/
      weights/00000  the first part: an Orbax checkpoint of one flat dictionary from names on disk to arrays
      weights/...    the others, in the order of the files
      orbax.json     what Orbax does not keep: the files, the format's dtypes, checksums of tensors and parts
      ...            config.json, tokenizer and all other files as they were

`orbax.checkpoint.v1.load(part)` gives the arrays without jaxmoe. A part has at most 64 MiB (or one tensor), and Orbax
holds several times as much while it works, whatever the size of the model: one checkpoint of everything would take all
of it in memory, or, added to part by part, a time that grows with the square of the number of tensors. Orbax stores no
empty arrays, and packed four-bit values are bytes to it.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import msgspec
import numpy as np

import jaxmoe
from jaxmoe.checkpoint import files, hub
from jaxmoe.checkpoint.array_folder import (
    DIMENSIONS,
    check_files,
    file_checksums,
    load_arrays,
    regular_files,
    save_arrays,
)
from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.records import read_record
from jaxmoe.checkpoint.tensor_file import (
    DTYPES,
    PACKED_BITS,
    Planned,
    TensorEntry,
    byte_size,
    file_metadata,
    in_order,
    listing,
    read_header,
    write_tensors,
)
from jaxmoe.checkpoint.workspace import Workspace, sweep
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.checking import first_and_last
from jaxmoe.export.folder import INDEX, copy_file, dump, files_beside, parts

RECORD, FOLDER = "orbax.json", "weights"
FORMAT_VERSION = 1
PART_BYTES = 64 * 1024**2
_MEND = "convert the checkpoint again"


def to_orbax(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Write a checkpoint, original or factored, as an Orbax checkpoint.

    Args:
        source: a folder or hub id.
        output: the folder to create; it gets its name when it is complete.

    Returns:
        `{"output", "stored": {"parameters", "bytes"}, "notes"}`; the notes say how the source was read.

    Raises:
        JaxmoeError: the source cannot be read, or the output exists.
    """
    folder = hub.resolve(source)
    files.read_config(folder)
    weights = files.read_weights(folder)
    tensors = weights.tensors
    output, made = output_folder(output, [folder]), files.fingerprint(folder, tensors)
    report = {**_report(output, tensors.values()), "notes": list(weights.notes)}
    if output.exists() and _made(output) == made:
        sweep(output)
        return report
    stored: dict[str, dict[str, Any]] = {}
    sums: list[dict[str, str]] = []
    with _workspace(output, {"convert": "orbax", "source": made}) as place:
        for number, part in enumerate(parts((entry for entry in _in_order(tensors) if entry.bytes), PART_BYTES)):
            arrays = {entry.name: entry.read() for entry in part}
            stored |= {name: {"part": number, "sha256": checksum(array)} for name, array in arrays.items()}
            # Weights hardly shrink.
            save_arrays(_part(place, number), arrays, compress=False)
            sums.append(file_checksums(_part(place, number)))
        _copy_beside(folder, place)
        record = {**_record(folder, tensors, stored), "parts": sums, "source": made}
        write_bytes(place / RECORD, dump(record))
        _check_parts(_Parts(place, _read_record(place)))
    return report


def to_safetensors(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Write an Orbax checkpoint of `to_orbax` as the safetensors checkpoint that it was made from.

    Args:
        source: its folder.
        output: the folder to create; it gets its name when it is complete.

    Returns:
        `{"output", "stored": {"parameters", "bytes"}}`.

    Raises:
        JaxmoeError: the source is no such folder or is damaged, or the output exists.
    """
    folder = Path(source).expanduser().absolute()
    record = _read_record(folder)
    written = _Parts(folder, record)
    output = output_folder(output, [folder])
    if output.exists() and _restored(output, record):
        sweep(output)
        return _report(output, written.tensors)
    with _workspace(output, {"convert": "safetensors", "source": record.source}) as place:
        for file, planned in written.planned.items():
            path = place / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, planned, record.files[file].metadata)
        _copy_beside(folder, place)
        if record.index is not None:
            weight_map = {tensor.name: file for file, planned in written.planned.items() for tensor in planned}
            write_bytes(place / INDEX, dump({**record.index, "weight_map": dict(sorted(weight_map.items()))}))
        ends = {name: record.files[name] for name in first_and_last(record.files)}
        if not _restored(place, msgspec.structs.replace(record, files=ends)):
            raise JaxmoeError(f"{place} was written and does not hold what {folder} does, so it gets no name: {_MEND}")
    return _report(output, written.tensors)


def _check_parts(written: "_Parts") -> None:
    """Read the first and the last part again, before the output gets its name."""
    for number in first_and_last(written.parts):
        for tensor in written.parts[number].values():
            tensor.produce()


def checksum(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


@contextmanager
def _workspace(output: Path, run: Mapping[str, Any]) -> Iterator[Path]:
    """Give a folder that becomes the output at the end of the `with` block."""
    workspace = Workspace(output, run)
    workspace.check_free()
    # Nothing is gone on with: reading and writing again is all there is to it.
    with workspace.opened([], resume=False), workspace.exclusive("convert"):
        yield workspace.folder
        workspace.publish()


def _made(output: Path) -> str | None:
    """Return the fingerprint of the checkpoint that an Orbax checkpoint was made from, None if it does not say."""
    try:
        return _read_record(output).source
    except JaxmoeError:
        return None


def _restored(output: Path, record: "_Record") -> bool:
    """Return whether a folder holds just the tensors of a record."""
    try:
        for file, written in record.files.items():
            found = read_header(output / file)
            if found.keys() != written.tensors.keys():
                return False
            for name, own in written.tensors.items():
                tensor = found[name]
                if (tensor.dtype, list(tensor.shape)) != (own.dtype, own.shape):
                    return False
                if tensor.bytes and checksum(tensor.read()) != own.sha256:
                    return False
    except JaxmoeError:
        return False
    return True


def _copy_beside(source: Path, target: Path) -> None:
    """Copy everything that is neither weights nor a record of them, config and tokenizer included."""
    for name, path in files_beside(source).items():
        if name != RECORD:
            copy_file(path, target / name)


def _in_order(tensors: Mapping[str, TensorEntry]) -> list[TensorEntry]:
    """Return the tensors in the order in which they will be written back, file by file."""
    held: dict[Path, list[TensorEntry]] = {}
    for entry in tensors.values():
        held.setdefault(entry.file, []).append(entry)
    return [entry for own in held.values() for entry in in_order(own)]


def _part(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"{number:05d}"


def _record(folder: Path, tensors: Mapping[str, TensorEntry], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return what it takes to write the same safetensors files again."""
    held: dict[str, Any] = {}
    for entry in tensors.values():
        file = entry.file.relative_to(folder).as_posix()
        own = held.setdefault(file, {"metadata": file_metadata(entry.shard), "tensors": {}})
        sizes = {"dtype": entry.dtype, "shape": list(entry.shape)}
        own["tensors"][entry.name] = {**sizes, **stored.get(entry.name, {})}
    index = folder / INDEX
    rest = None
    if next(iter(held)) != files.SINGLE and index.exists():
        read = read_record(index, dict[str, Any], "fetch the index again")
        rest = {key: value for key, value in read.items() if key != "weight_map"}
    return {"format_version": FORMAT_VERSION, "version": jaxmoe.__version__, "index": rest, "files": held}


class _Version(msgspec.Struct):
    """What every format has."""

    format_version: Annotated[int, msgspec.Meta(ge=1)]
    version: str = "unknown"


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: Annotated[str, msgspec.Meta(pattern=rf"^({'|'.join([*DTYPES, *PACKED_BITS])})\Z")]
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=2**62)]], msgspec.Meta(max_length=DIMENSIONS)]
    part: Annotated[int, msgspec.Meta(ge=0, le=10**9)] | None = None
    sha256: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    metadata: dict[str, str]
    tensors: dict[str, _Tensor]


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """What stands in `orbax.json`."""

    format_version: int
    version: str
    index: dict[str, Any] | None
    files: Annotated[dict[str, _File], msgspec.Meta(min_length=1)]
    parts: list[dict[str, str]] = []
    source: str | None = None


def _read_record(folder: Path) -> _Record:
    path = folder / RECORD
    if not folder.is_dir():
        raise JaxmoeError(f"{folder} is no folder: give one that `jaxmoe convert --to orbax` wrote")
    if not path.is_file() or not (folder / FOLDER).is_dir():
        raise JaxmoeError(
            f"{folder} is no Orbax checkpoint that jaxmoe wrote: it lacks {RECORD} or {FOLDER}/; give the folder that"
            " `jaxmoe convert --to orbax` wrote"
        )
    version = read_record(path, _Version, _MEND)
    if version.format_version > FORMAT_VERSION:
        raise JaxmoeError(
            f"{path} has format {version.format_version}, written by jaxmoe {version.version}, and jaxmoe"
            f" {jaxmoe.__version__} reads up to {FORMAT_VERSION}: pip install --upgrade jaxmoe"
        )
    record = read_record(path, _Record, _MEND)
    names = [name for own in record.files.values() for name in own.tensors]
    if len(set(names)) < len(names):
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        raise JaxmoeError(f"{path} names {listing(twice, 8)} in several files: {_MEND}")
    for own in record.files.values():
        for name, tensor in own.tensors.items():
            # Orbax stores no empty arrays.
            if (tensor.part is None) != (byte_size(tensor.dtype, tensor.shape) == 0) or bool(tensor.sha256) is (
                tensor.part is None
            ):
                raise JaxmoeError(f"{path} does not say where {name} lies and what its checksum is: {_MEND}")
    return record


class _Parts:
    """The tensors of an Orbax checkpoint, planned by file, and the one part of them that is in memory."""

    def __init__(self, folder: Path, record: _Record):
        self.folder = folder
        self.sums = record.parts
        self.parts: dict[int, dict[str, Planned]] = {}
        self.held: dict[str, np.ndarray] = {}
        self.planned = {
            _inside(folder, file): in_order([self._plan(name, tensor) for name, tensor in own.tensors.items()])
            for file, own in record.files.items()
        }
        self.tensors = [tensor for planned in self.planned.values() for tensor in planned]

    def _plan(self, name: str, tensor: _Tensor) -> Planned:
        dtype, shape, part = tensor.dtype, tuple(tensor.shape), tensor.part
        if part is None:
            return Planned(name, dtype, shape, lambda: np.empty(shape, DTYPES.get(dtype, np.uint8)))
        planned = Planned(name, dtype, shape, lambda: self._read(name, part, tensor.sha256))
        self.parts.setdefault(part, {})[name] = planned
        return planned

    def _read(self, name: str, part: int, sha256: str) -> np.ndarray:
        if name not in self.held:
            self.held = {}
            self.held = self._load(part)
        array = self.held.pop(name)
        if checksum(array) != sha256:
            raise JaxmoeError(f"{_part(self.folder, part)}: {name} is not what was written: {_MEND}")
        return array

    def _load(self, part: int) -> dict[str, np.ndarray]:
        path, planned = _part(self.folder, part), self.parts[part].values()
        try:
            # Some changed bytes Orbax does not notice, and of others it says much. Older folders have no sums of files.
            if part < len(self.sums):
                check_files(path, self.sums[part])
            held = sum(file.stat().st_size for file in regular_files(path))
        except JaxmoeError as error:
            raise JaxmoeError(f"{error}: {_MEND}") from None
        # Before a wrong shape takes all memory: what is missing on disk Orbax would fill with zeros.
        if held < (wanted := sum(tensor.bytes for tensor in planned)):
            raise JaxmoeError(f"{path} has {held} bytes, and its tensors take {wanted}: {_MEND}")
        return load_arrays(path, {tensor.name: _abstract(tensor) for tensor in planned}, _MEND)


def _inside(folder: Path, file: str) -> str:
    pure = PurePosixPath(file)
    if pure.is_absolute() or ".." in pure.parts or "\\" in file or ":" in file or pure.suffix != ".safetensors":
        raise JaxmoeError(f"{folder / RECORD}: {file!r} is no name of a file inside the folder; convert again")
    return file


def _abstract(tensor: Planned) -> np.ndarray:
    """Return something of a tensor's shape and dtype that takes no memory."""
    if tensor.code not in DTYPES:
        return np.broadcast_to(np.uint8(0), (byte_size(tensor.code, tensor.shape),))
    return np.broadcast_to(np.empty((), DTYPES[tensor.code]), tensor.shape)


def _report(output: str | Path, tensors) -> dict[str, Any]:
    tensors = list(tensors)
    stored = {"parameters": sum(own.numbers for own in tensors), "bytes": sum(own.bytes for own in tensors)}
    return {"output": str(Path(output).absolute()), "stored": stored}
