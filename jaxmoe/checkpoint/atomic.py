"""Files that appear whole or not at all."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from jaxmoe.errors import StorageError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name only after everything was written and reached the disk.

    On any failure the temporary file, which lies in the same folder, is removed.

    Raises:
        StorageError: the disk is full, the quota exhausted, or the file cannot be written; the message names it and the
            mend.
    """
    # Random: machines that share a folder may have equal process numbers. Short: the own name may be the longest.
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def unwritten(path: Path, error: OSError) -> StorageError:
    """Return the error for a file or folder that the system did not let be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(
            f"no space left to write {path}: free some, then run the same command again; finished layers are kept"
        )
    return StorageError(
        f"{path} cannot be written ({error.strerror or error}): mend that, then run the same command again, or choose"
        " another output folder"
    )


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove what stands at a path, if anything: a folder with all that is in it, but of a link only the link.

    Raises:
        StorageError: the system does not let it go.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be removed ({error.strerror or error}): remove it by hand") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    with atomic_file(path) as file:
        file.write(content)
