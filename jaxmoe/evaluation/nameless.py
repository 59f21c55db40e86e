"""Hidden states in files without names: whatever ends the program, nothing of them remains on disk."""

import os
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.streaming import TOKENS, HiddenStates


class NamelessStates(HiddenStates):
    """Hidden states between two layers, in files that the system frees when nobody reads them any more.

    Args:
        ids: the windows, `[window, position]`.
        hidden: hidden size.
        work: folder on whose disk the files are; that for temporary files if None.
        tokens: that go through a layer together, at least one window's.

    Example:
        >>> states = NamelessStates(np.zeros((2, 3), np.int32), hidden=4)
        >>> states.create(0)[:] = 1
        >>> float(states.open(0).sum()), states.remove(0)
        (24.0, None)
    """

    def __init__(self, ids: np.ndarray, hidden: int, *, work: Path | None = None, tokens: int = TOKENS):
        super().__init__(ids, Path(work or gettempdir()), hidden, tokens=tokens)
        self._arrays: dict[int, np.ndarray] = {}

    def open(self, index: int) -> np.ndarray:
        return self._arrays[index]

    def create(self, index: int) -> np.ndarray:
        size = int(np.prod(self.shape)) * np.dtype(np.float32).itemsize
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.folder) as file:
                if hasattr(os, "posix_fallocate"):
                    # A mapped file without its disk space would end the program when it is written.
                    os.posix_fallocate(file.fileno(), 0, size)
                self._arrays[index] = np.memmap(file, np.float32, "r+", shape=self.shape)
        except OSError as error:
            raise JaxmoeError(
                f"{self.folder}: no place for {size / 1e9:.2f} GB of hidden states ({error.strerror or error}):"
                " name a folder on another disk as working folder, or evaluate fewer or shorter windows"
            ) from error
        return self._arrays[index]

    def finish(self, index: int) -> None:
        pass

    def remove(self, index: int) -> None:
        self._arrays.pop(index, None)
