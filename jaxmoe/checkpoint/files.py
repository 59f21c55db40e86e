"""The files of a checkpoint: its config, and which tensor lies in which shard.

Names in an index come from whoever made the checkpoint: they must stay inside its folder, also through links.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import msgspec

from jaxmoe.checkpoint.families.parts.keys import EVERYWHERE, check_kinds
from jaxmoe.checkpoint.hub_cache import blob_folders
from jaxmoe.checkpoint.index import Weights, reconcile
from jaxmoe.checkpoint.records import read_bytes, read_record
from jaxmoe.checkpoint.tensor_file import TensorEntry, listing, read_header
from jaxmoe.errors import JaxmoeError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Index:
    """What is read of an index: the file that holds each tensor."""

    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `config.json`.

    Raises:
        JaxmoeError: if it is missing, no JSON object, names no architecture, or says what no architecture could mean.
    """
    mend = "give the folder of a checkpoint, which has one as the model's authors wrote it"
    config = read_record(folder / CONFIG, dict[str, Any], mend)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise JaxmoeError(f"{folder / CONFIG} names no model_type: jaxmoe cannot tell the architecture; add the key")
    try:
        check_kinds(config, names=EVERYWHERE)
        check_kinds(config.get("text_config") or {}, names=EVERYWHERE)
    except JaxmoeError as error:
        raise JaxmoeError(f"{folder}: {error}") from None
    return config


def read_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Return all tensors of a checkpoint by name, as `read_weights` finds them."""
    return read_weights(folder).tensors


def read_weights(folder: Path) -> Weights:
    """Find all tensors of a checkpoint: those of `model.safetensors`, or else of the files that an index names.

    Raises:
        JaxmoeError: if there are no safetensors files, or a file is missing, damaged or outside the folder; all
            offenders are listed.
    """
    # A file that is none (a folder, a dead link) counts only where there is no index, as in transformers.
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() or (_there(single) and not index.is_file()):
        tensors = read_header(_inside(folder, SINGLE, []))
        ignored = f"{SINGLE} is read, and the {INDEX} beside it is not, as in transformers."
        return Weights(tensors, notes=(ignored,) if _there(index) else ())
    if not _there(index):
        raise JaxmoeError(_no_weights(folder))
    weight_map = read_index(folder)
    problems: list[str] = []
    paths = {file: _inside(folder, file, problems) for file in sorted(set(weight_map.values()))}
    if problems:
        raise JaxmoeError(
            f"{index} names files that are not there: fetch them, or the index again. {listing(problems)}"
        )
    return reconcile(weight_map, {file: read_header(path) for file, path in paths.items()})


def read_index(folder: Path) -> dict[str, str]:
    """Return which file an index names for each tensor."""
    return read_record(folder / INDEX, Index, "fetch the index again").weight_map


def fingerprint(folder: Path, tensors: Mapping[str, TensorEntry]) -> str:
    """Return a SHA-256 that changes with the config, any header and, almost surely, any retrained weights.

    Of each shard, its name, size, header and evenly spaced blocks of its content count, so that a checkpoint of a
    terabyte costs a second.
    """
    digest = hashlib.sha256(read_bytes(folder / CONFIG))
    shards = {entry.shard.path: entry.shard for entry in tensors.values()}
    for path, shard in sorted(shards.items()):
        digest.update(f"{path.name} {shard.size} ".encode())
        digest.update(shard.read(0, shard.data).data)
        span = max(0, shard.size - shard.data - _SAMPLE_BYTES)
        for step in range(_SAMPLES):
            begin = shard.data + span * step // (_SAMPLES - 1)
            digest.update(shard.read(begin, min(begin + _SAMPLE_BYTES, shard.size)).data)
    return digest.hexdigest()


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _inside(folder: Path, file: str, problems: list[str]) -> Path:
    """Return the path of a named file; a name that leads out of the folder, or nowhere, is a problem."""
    path = folder / file
    pure = PurePosixPath(file.replace("\\", "/"))
    if not file or pure.is_absolute() or ".." in pure.parts or ":" in file or "\0" in file:
        problems.append(f"{file!r} lies outside the folder")
        return path
    try:
        target, exists = path.resolve(), path.exists()
    except (OSError, RuntimeError) as error:
        problems.append(f"{file} cannot be followed ({getattr(error, 'strerror', None) or error})")
        return path
    if not any(target.is_relative_to(root) for root in (folder.resolve(), *blob_folders(folder))):
        raise JaxmoeError(f"{path} is a link out of the checkpoint's folder, to {target}: put the file itself there")
    if not exists:
        problems.append(f"{file} is missing")
    return path


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    other = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))]
    tensors = [name for name in names if name.endswith(".safetensors")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if "orbax.json" in names:
        return (
            f"{folder} holds an Orbax checkpoint: write it as safetensors with `jaxmoe convert --to safetensors` first"
        )
    if "adapter_config.json" in names:
        return f"{folder} holds an adapter, not a model: merge it into its base model first"
    if tensors:
        return (
            f"{folder} has {listing(tensors, 5)} and neither {SINGLE} nor {INDEX}: fetch the index too, or rename a"
            f" single file to {SINGLE}"
        )
    if ggufs and not other:
        return (
            f"{folder} has its weights in {listing(ggufs, 5)}, which is llama.cpp's format: only safetensors are read;"
            " take the checkpoint that they were made from"
        )
    if other:
        return (
            f"{folder} has its weights in {listing(other, 5)}: only safetensors are read, for safety; save the model"
            " again with save_pretrained, which writes them"
        )
    return (
        f"{folder} has neither {SINGLE} nor {INDEX}: the weights are missing; fetch them, or save them as safetensors"
    )
