"""Hidden states in files without names: whatever ends the program, nothing of them remains on disk."""

from pathlib import Path
from tempfile import gettempdir

import numpy as np

from jaxmoe.checkpoint.mapped import create_mapped
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
        self._arrays[index] = create_mapped(self.folder, "float32", self.shape, named=False)
        return self._arrays[index]

    def finish(self, index: int) -> None:
        pass

    def remove(self, index: int) -> None:
        self._arrays.pop(index, None)
