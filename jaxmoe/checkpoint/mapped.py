"""Arrays in mapped files: as large as the disk allows, and no part of a process's own memory."""

import os
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from jaxmoe.errors import StorageError


def create_mapped(path: Path, dtype: str, shape: tuple[int, ...], *, named: bool = True) -> np.ndarray:
    """Return an array of zeros that lies in a new file.

    Args:
        path: of the file, which takes the place of one that exists; the folder to put it in, if it has no name.
        dtype: of the array.
        shape: of the array.
        named: False for a file without a name, which is gone as soon as nobody uses the array.

    Raises:
        StorageError: there is no space for it. Without that check, writing to the array would end the program.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        (path.parent if named else path).mkdir(parents=True, exist_ok=True)
        if named:
            # A new file, never what a link of that name leads to.
            path.unlink(missing_ok=True)
        with path.open("xb+") if named else TemporaryFile(dir=path) as file:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise StorageError(
            f"{path}: no place for {size / 1e9:.2f} GB of hidden states or sums ({error.strerror or error}): free some"
            " space, name a folder on another disk as working folder, or give fewer or shorter windows"
        ) from error
