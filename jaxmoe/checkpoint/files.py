"""The files of a checkpoint: its config, and which tensor lies in which shard.

Names in an index come from whoever made the checkpoint: they must stay inside its folder, also through links.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jaxmoe.checkpoint.tensor_file import TensorEntry, header_bytes, listing, read_header
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.keys import EVERYWHERE, check_kinds

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `config.json`.

    Raises:
        JaxmoeError: if it is missing, no JSON object, names no architecture, or says what no architecture could mean.
    """
    config = read_json(folder / CONFIG, "a checkpoint's folder has one; give the folder that holds it")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise JaxmoeError(f"{folder / CONFIG} names no model_type: jaxmoe cannot tell the architecture; add the key")
    try:
        check_kinds(config, names=EVERYWHERE)
    except JaxmoeError as error:
        raise JaxmoeError(f"{folder}: {error}") from None
    return config


def read_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Return all tensors of a checkpoint by name, in the order of the shards and of their bytes.

    Raises:
        JaxmoeError: if there are no safetensors files, a file is missing, damaged or outside the folder, or the index
            and the files disagree; all offenders are listed.
    """
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return read_header(_inside(folder, SINGLE, []))
    if not (folder / INDEX).exists():
        raise JaxmoeError(_no_weights(folder))
    index = read_json(folder / INDEX, "fetch the checkpoint again")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not {*map(type, weight_map.values())} == {str}:
        raise JaxmoeError(f"{folder / INDEX} has no weight_map of tensors to files: fetch it again")
    problems: list[str] = []
    paths = {file: _inside(folder, file, problems) for file in sorted(set(weight_map.values()))}
    if problems:
        raise JaxmoeError(f"{folder / INDEX}: fetch the checkpoint again. {listing(problems)}")
    shards = {file: read_header(path) for file, path in paths.items()}
    _check_index(weight_map, shards, folder / INDEX)
    return {name: entry for header in shards.values() for name, entry in header.items()}


def _check_index(weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    problems = [f"{name} is not in {file}" for name, file in weight_map.items() if name not in shards[file]]
    for file, header in shards.items():
        for name in header:
            if name not in weight_map:
                problems.append(f"{name} in {file} is not in the index")
            elif weight_map[name] != file:
                problems.append(f"{name} is in {file}, and the index places it in {weight_map[name]}")
    if problems:
        raise JaxmoeError(f"{path} and the files do not agree: fetch the checkpoint again. {listing(problems)}")


def fingerprint(folder: Path, tensors: Mapping[str, TensorEntry]) -> str:
    """Return a SHA-256 that changes with the config, any header and, almost surely, any retrained weights.

    Of each shard, its name, size, header and evenly spaced blocks of its content count, so that a checkpoint of a
    terabyte costs a second.
    """
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for path in sorted({entry.file for entry in tensors.values()}):
        size = path.stat().st_size
        header = header_bytes(path)
        digest.update(f"{path.name} {size} ".encode() + header)
        with open(path, "rb") as file:
            span = max(0, size - len(header) - _SAMPLE_BYTES)
            for step in range(_SAMPLES):
                file.seek(len(header) + span * step // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _inside(folder: Path, file: str, problems: list[str]) -> Path:
    """Return the path of a named file; a name that leads out of the folder, or nowhere, is a problem."""
    path = folder / file
    pure = PurePosixPath(file.replace("\\", "/"))
    root = folder.resolve()
    if root.parent.name == "snapshots":
        # The hub's cache keeps a snapshot as links to the blobs of the same repository.
        root = root.parent.parent
    if not file or pure.is_absolute() or ".." in pure.parts or ":" in file:
        problems.append(f"{file!r} lies outside the folder")
    elif not path.resolve().is_relative_to(root):
        raise JaxmoeError(
            f"{path} is a link out of the checkpoint's folder, to {path.resolve()}: put the file itself there"
        )
    elif not path.is_file():
        problems.append(f"{file} is missing")
    return path


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """Return a JSON object; `mend` says what to do if there is no such file.

    Raises:
        JaxmoeError: if the file is missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise JaxmoeError(f"{path} does not exist: {mend}") from None
    except (ValueError, RecursionError) as error:
        raise JaxmoeError(f"{path} is not JSON ({error}): fetch it again") from error
    except OSError as error:
        raise JaxmoeError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise JaxmoeError(f"{path} is not a JSON object: fetch it again")
    return content


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    other = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf"))]
    tensors = [name for name in names if name.endswith(".safetensors")]
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
    if other:
        return (
            f"{folder} has its weights in {listing(other, 5)}: only safetensors are read, for safety; save the model"
            " again with save_pretrained, which writes them"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}: the weights are missing; fetch them"
