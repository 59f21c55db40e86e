"""The folder that a user gets: the layers' files joined by everything else of the source, and an index written last.

A folder with an index is complete: nothing in it is still to come. Layers keep one file each, the tensors that no
method touched are copied byte for byte into shards of their own.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxmoe.checkpoint.atomic import atomic_file, write_bytes
from jaxmoe.checkpoint.records import open_regular, seal
from jaxmoe.checkpoint.tensor_file import Planned, TensorEntry, read_header, write_tensors
from jaxmoe.checkpoint.workspace import REPORT

T = TypeVar("T", Planned, TensorEntry)

SHARD_BYTES = 4 * 1024**3
INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".index.json")
TEMPLATES = "additional_chat_templates"
"""The one folder in a checkpoint's that belongs to it: chat templates beside the default one."""
REWRITTEN = ("config.json", "README.md", "recipe.yaml", REPORT)
OF_QUANTIZATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quant_strategy.json")
"""Files in which tools say how they quantised the weights: nothing that is written is quantised."""


def files_beside(source: Path) -> dict[str, Path]:
    """Return all files of a checkpoint but its weights, by their names relative to its folder."""
    files = [*source.iterdir(), *(source / TEMPLATES).glob("*.jinja")]
    names = {path.relative_to(source).as_posix(): path for path in sorted(files) if path.is_file()}
    return {name: path for name, path in names.items() if not name.startswith(".") and not name.endswith(WEIGHTS)}


def side_files(source: Path) -> dict[str, Path]:
    """Return the files that travel as they are: tokenizer, chat templates, generation config, licence, its own code."""
    left_out = (*REWRITTEN, *OF_QUANTIZATION)
    return {name: path for name, path in files_beside(source).items() if name not in left_out}


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file, which appears whole or not at all."""
    target.parent.mkdir(exist_ok=True)
    with open_regular(source) as content, atomic_file(target) as copy:
        shutil.copyfileobj(content, copy)


def dump(record: Mapping[str, Any]) -> bytes:
    """Return JSON as the hub's files have it: two spaces, a final newline, letters as they are."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def write_report(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Write what a run has to say into its folder, with a seal, and return that.

    The same command reads it again where it meets the finished folder, and has to know that it is whole.
    """
    whole = {**report, "seal": seal(report)}
    write_bytes(folder / REPORT, dump(whole))
    return whole


def parts(tensors: Iterable[T], limit: int) -> Iterator[list[T]]:
    """Cut tensors, in their order, into lists of at most `limit` bytes (or one tensor)."""
    part: list[T] = []
    size = 0
    for tensor in tensors:
        if part and size + tensor.bytes > limit:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.bytes
    if part:
        yield part


def shards(tensors: Sequence[Planned], limit: int = SHARD_BYTES) -> Iterator[list[Planned]]:
    """Split tensors, in the order of their names, into lists of at most `limit` bytes (or one tensor)."""
    return parts(sorted(tensors, key=lambda planned: planned.name), limit)


def complete_folder(
    folder: Path,
    *,
    layers: Iterable[Path],
    copied: Sequence[Planned],
    config: Mapping[str, Any],
    code: Mapping[str, str],
    beside: Mapping[str, Path],
) -> dict[str, int]:
    """Write everything but the layers' files, the index last.

    Args:
        folder: where the finished layers lie.
        layers: their files.
        copied: the tensors that no layer's file holds.
        config: what `config.json` will say.
        code: further text files by name, such as remote code.
        beside: files to copy as they are, by name.

    Returns:
        `{"parameters": elements, "bytes": bytes}` of all tensors in the folder, from the files' own headers.
    """
    files = sorted(layers)
    for number, shard in enumerate(shards(copied), start=1):
        path = folder / f"model-rest-{number:05d}.safetensors"
        write_tensors(path, shard)
        files.append(path)

    for name, text in code.items():
        write_bytes(folder / name, text.encode())
    for name, path in beside.items():
        if name not in code:
            copy_file(path, folder / name)
    write_bytes(folder / "config.json", dump(config))

    entries = {path.name: read_header(path) for path in files}
    held = [entry for header in entries.values() for entry in header.values()]
    total = sum(entry.bytes for entry in held)
    weight_map = {name: file for file, header in entries.items() for name in header}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_bytes(folder / INDEX, dump(index))
    return {"parameters": sum(entry.numbers for entry in held), "bytes": total}
