"""A file of weights, as it was when its header was read, and its bytes, read into memory of our own.

Files of many gigabytes are replaced under programs that run for hours: by a fresh download, a copy, a synchronised
folder. A mapped file that shrinks ends the process without a word, and one that is written anew gives a mixture of two
models. So bytes are read, not mapped, and every reading makes sure that the file is still the one that was opened.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxmoe.checkpoint.records import open_regular, unreadable
from jaxmoe.errors import StorageError

_BOUNDARY = 64


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of weights.

    Args:
        path: where it lies.
        size: in bytes.
        changed: when it was last written, in nanoseconds.
        data: where its header ends.
    """

    path: Path
    size: int
    changed: int
    data: int

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return some of the bytes, `[end - begin]`, as an array of its own that cannot be written to.

        Raises:
            StorageError: the file is gone, cannot be read, or was written to since its header was read.
        """
        values = aligned_bytes(end - begin)
        with open_regular(self.path) as file:
            try:
                file.seek(begin)
                got = file.readinto(values.data)
                status = os.fstat(file.fileno())
            except OSError as error:
                raise unreadable(self.path, error) from None
        if got < len(values) or (status.st_size, status.st_mtime_ns) != (self.size, self.changed):
            raise StorageError(
                f"{self.path} was changed while it was in use (it had {self.size} bytes, now {status.st_size}): wait"
                " until whatever writes it is done, then run the same command again"
            )
        values.flags.writeable = False
        return values


def aligned_bytes(size: int) -> np.ndarray:
    """Return uninitialised bytes on a 64-byte boundary: XLA on CPU copies any other array, twice at its peak.

    Example:
        >>> aligned_bytes(100).ctypes.data % 64
        0
    """
    raw = np.empty(size + _BOUNDARY - 1, np.uint8)
    start = -raw.ctypes.data % _BOUNDARY
    return raw[start : start + size]
