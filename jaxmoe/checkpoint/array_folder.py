"""Arrays by name in one folder, as an Orbax checkpoint: written whole or not at all, and read with care.

Orbax and TensorStore parse a dozen small files, and raise whatever a changed byte leads their parsers to; some changed
bytes they do not notice. So callers keep checksums, of arrays or of files (`file_checksums`), and here every failure of
theirs becomes one message that names the folder.
"""

import os
import stat
from collections.abc import Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint.records import file_kind, open_regular, unreadable
from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.errors import JaxmoeError

DIMENSIONS = 32
"""The most that TensorStore takes of an array."""


def save_arrays(folder: Path, arrays: Mapping[str, Any], *, compress: bool = True) -> None:
    """Write arrays, numpy's or JAX's, into a new folder.

    Args:
        folder: to create; what a killed run left there is removed.
        arrays: by name.
        compress: whether to compress them.

    Raises:
        JaxmoeError: they cannot be written.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = compress
    if many := [name for name, array in arrays.items() if len(array.shape) > DIMENSIONS]:
        raise JaxmoeError(f"{many[0]} has {len(arrays[many[0]].shape)} dimensions, and Orbax stores up to {DIMENSIONS}")
    try:
        with context:
            ocp.save(str(folder.absolute()), dict(arrays))
    except OSError:
        # The system's own words say more: no space, no permission.
        raise
    except Exception as error:  # A foreign library that documents none, and reports a full disk in its own ways.
        raise JaxmoeError(
            f"{folder} cannot be written ({_reason(error)}): see that there is space and permission, then run the same"
            " command again"
        ) from error


def load_arrays(folder: Path, abstract: Mapping[str, Any], mend: str) -> dict[str, Any]:
    """Return the arrays of a folder.

    Args:
        folder: that `save_arrays` wrote.
        abstract: name to something with the shape and dtype, and perhaps the sharding, that the array must have.
        mend: what to do where it cannot be read.

    Raises:
        JaxmoeError: it cannot be read, or lacks an array.
    """
    from orbax.checkpoint import v1 as ocp

    try:
        regular_files(folder)
        # Asked for another shape than is there, Orbax pads or cuts.
        _check_held(folder, ocp.metadata(str(folder.absolute())).metadata, abstract)
        return ocp.load(str(folder.absolute()), dict(abstract))
    except JaxmoeError as error:
        raise JaxmoeError(f"{error}: {mend}") from None
    except Exception as error:  # Whatever a changed byte leads the parsers of a foreign library to.
        raise JaxmoeError(f"{folder} cannot be read ({_reason(error)}): {mend}") from error


def _check_held(folder: Path, held: Mapping[str, Any], abstract: Mapping[str, Any]) -> None:
    for name, wanted in abstract.items():
        if name not in held:
            raise JaxmoeError(f"{folder} holds no {name}")
        if (found := (tuple(held[name].shape), held[name].dtype)) != (tuple(wanted.shape), wanted.dtype):
            raise JaxmoeError(
                f"{folder} holds {name} as {found[1]} {list(found[0])}, not as {wanted.dtype} {list(wanted.shape)}"
            )


def regular_files(folder: Path) -> list[Path]:
    """Return all files in a folder and its folders, in order.

    Raises:
        JaxmoeError: there is no such folder, or something in it is neither a file nor a folder: a link could lead
            anywhere, and a pipe would be waited for without end.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise JaxmoeError(f"{folder} is no folder")

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error) from None

    found = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        for name in (*folders, *files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.append(path)
            elif not stat.S_ISDIR(mode):
                raise JaxmoeError(f"{path} is not a regular file but a {file_kind(mode)}")
    return sorted(found)


def file_checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder and its folders by its path within.

    Raises:
        JaxmoeError: as `regular_files`, or a file cannot be read.
    """
    sums = {}
    for path in regular_files(folder):
        with open_regular(path) as file:
            try:
                sums[path.relative_to(folder).as_posix()] = file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise unreadable(path, error) from None
    return sums


def check_files(folder: Path, sums: Mapping[str, str]) -> None:
    """Raise unless a folder holds just the files that `file_checksums` saw, as they were.

    Raises:
        JaxmoeError: some changed, are gone or were added; the message names the first ones.
    """
    found = file_checksums(folder)
    if changed := sorted(name for name in {*found, *sums} if found.get(name) != sums.get(name)):
        raise JaxmoeError(f"{listing([str(folder / name) for name in changed], 3)}: not what was written")


def _reason(error: Exception) -> str:
    """Return the first words of an error: TensorStore goes on for pages."""
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return first.split(" [")[0][:300]
