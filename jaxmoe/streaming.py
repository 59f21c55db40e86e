"""Run a model that may be larger than memory: layer after layer, and batch after batch within each layer.

Hidden states of all windows lie in a memory-mapped file, one file per layer boundary; while a layer works, the arrays
of the next one are read in the background. Layers of equal spec share one compiled program. What is in memory at any
time is one layer (and the next), one batch, and whatever the caller gathers.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.mapped import create_mapped
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.checkpoint.workspace import START_OVER
from jaxmoe.errors import JaxmoeError, StorageError
from jaxmoe.model.blocked import BlockShape, block_rows, blocks_needed
from jaxmoe.model.decoder import embed
from jaxmoe.model.layer import Attended, Intermediates, attended, finish
from jaxmoe.model.spec import ExpertBlock, LayerSpec

TOKENS = 4096
"""Tokens that go through a layer together."""

LARGE = 32 << 20
"""Bytes of a layer from which on it is worth the time to return its memory to the system."""

Observe = Callable[[Intermediates, Any], Any]


class Step(NamedTuple):
    """What became of one batch in one layer: the windows that it holds, and what was observed of them."""

    windows: slice
    observed: Any


class HiddenStates:
    """The hidden states of some windows of tokens between two layers, in files.

    Args:
        ids: the windows, `[window, position]`.
        folder: for the files `hidden00000.f32`, which the caller removes in the end.
        hidden: hidden size.
        tokens: that go through a layer together, at least one window's.
    """

    def __init__(self, ids: np.ndarray, folder: Path, hidden: int, *, tokens: int = TOKENS):
        self.ids = ids
        self.folder = folder
        self.shape = (*ids.shape, hidden)
        self.batch = min(len(ids), max(1, tokens // ids.shape[1]))

    def path(self, index: int) -> Path:
        """Return the file of the states that enter a layer."""
        return self.folder / f"hidden{index:05d}.f32"

    def whole(self, index: int) -> bool:
        """Return whether the states that enter a layer are there, from this run or one before it."""
        path = self.path(index)
        return path.is_file() and path.stat().st_size == 4 * prod(self.shape)

    def open(self, index: int) -> np.ndarray:
        """Return the states that enter a layer, `[window, position, hidden]`, mapped.

        Raises:
            StorageError: they are gone, or were cut.
        """
        if not self.whole(index):
            raise StorageError(f"{self.path(index)}, hidden states of an unfinished run, is not whole: {START_OVER}")
        return np.memmap(self.path(index), np.float32, "r", shape=self.shape)

    def create(self, index: int) -> np.ndarray:
        """Return an empty file for the states that enter a layer, mapped; `finish` gives it its name."""
        return create_mapped(self.path(index).with_suffix(".part"), "float32", self.shape)

    def finish(self, index: int) -> None:
        """Name the file that `create` began."""
        self.path(index).with_suffix(".part").replace(self.path(index))

    def remove(self, index: int) -> None:
        """Remove the states that enter a layer."""
        self.path(index).unlink(missing_ok=True)

    def batches(self, part: slice = slice(None)) -> Iterator[slice]:
        """Yield the windows of each batch, of all windows or of some; the last one may be smaller."""
        first, end, _ = part.indices(len(self.ids))
        for begin in range(first, end, self.batch):
            yield slice(begin, min(begin + self.batch, end))


class TemporaryStates(HiddenStates):
    """Hidden states in files without names: whatever ends the program, nothing of them remains on disk.

    Args:
        ids: the windows, `[window, position]`.
        hidden: hidden size.
        work: folder on whose disk the files are; that for temporary files if None.
        tokens: that go through a layer together, at least one window's.

    Example:
        >>> states = TemporaryStates(np.zeros((2, 3), np.int32), hidden=4)
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


def on_device(arrays: Any) -> Any:
    """Return a tree of arrays on the device, in the dtype in which they are stored."""
    return jax.tree.map(jnp.asarray, arrays)


class Prefetched:
    """The layers of a model in the order in which they are asked for, each read while the one before is at work.

    Args:
        model: that they are read from.
        order: indices of the layers.
    """

    def __init__(self, model: StoredModel, order: range):
        self.model, self.order = model, order

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with ThreadPoolExecutor(1) as reader:
            ahead = None
            for position, index in enumerate(self.order):
                parameters = ahead.result() if ahead else self._read(index)
                follows = self.order[position + 1 : position + 2]
                ahead = reader.submit(self._read, follows[0]) if follows else None
                yield index, parameters
                large = sum(array.nbytes for array in jax.tree.leaves(parameters)) > LARGE
                del parameters
                if large:
                    give_back()

    def _read(self, index: int) -> dict[str, Any]:
        return on_device(self.model.layer(index))


def give_back() -> None:
    """Return freed memory to the system; glibc keeps what lies between buffers in use, and more with every layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def start(model: StoredModel, states: HiddenStates) -> None:
    """Embed the tokens: write the states that enter layer 0."""
    parameters = on_device(model.ends("embedding.weight"))
    out = states.create(0)
    for windows in states.batches():
        out[windows] = embedded(states.ids[windows], parameters, spec=model.spec)
    states.finish(0)


def run_layer(
    index: int,
    parameters: dict[str, Any],
    spec: LayerSpec,
    states: HiddenStates,
    out: np.ndarray | None,
    *,
    part: slice = slice(None),
    observe: Observe | None = None,
    extra: np.ndarray | None = None,
    reads: tuple[str, ...] = (),
) -> Iterator[Step]:
    """Move states through one layer, and yield after each batch what was observed in it.

    Args:
        index: of the layer; the states that enter it must exist.
        parameters: its arrays, on the device.
        spec: what it computes.
        states: of which those at `index` are read.
        out: where the states that leave the layer are written, as `states.create(index + 1)` returns it; None for
            nowhere.
        part: the windows to move.
        observe: pure function of the layer's intermediates and of a batch of `extra`, itself a pytree; jitted with the
            layer.
        extra: an array with a row for every window, of which each batch goes to `observe`.
        reads: of what attention's linear maps read, the names that `observe` looks at.

    Raises:
        JaxmoeError: hidden states are not finite; the message names the layer and the experts.
    """
    source = states.open(index)
    # Without the experts, whose shapes may differ from layer to layer: one program attends for all.
    attending = {name: array for name, array in parameters.items() if not name.startswith(("experts", "auxiliary"))}
    for windows in states.batches(part):
        state = _attended(jnp.asarray(source[windows]), attending, spec=spec, reads=reads)
        given = None if extra is None else extra[windows]
        x, observed = _finish(state, parameters, given, observe, spec=spec, shape=block_shape(state, spec))
        x = np.asarray(x)
        if not np.isfinite(x).all():
            raise JaxmoeError(_not_finite(index, x, state))
        if out is not None:
            out[windows] = x
        step = Step(windows, observed)
        # What was observed may be large, and is the caller's alone.
        del state, x, observed
        yield step
        del step


def block_shape(state: Attended, spec: LayerSpec) -> BlockShape | None:
    """Choose the experts' blocks from the routing of a batch; None in a layer without experts."""
    if state.routes is None or not isinstance(spec.feed_forward, ExpertBlock):
        return None
    chosen = np.asarray(state.routes.experts)[:, : spec.feed_forward.running]
    experts = spec.feed_forward.shape.experts
    rows = block_rows(chosen.size, experts)
    return BlockShape(rows, blocks_needed(np.bincount(chosen.reshape(-1), minlength=experts), rows))


def stream(model: StoredModel, states: HiddenStates) -> Iterator[tuple[int, Step]]:
    """Move all states through all layers, and yield the layer's index with every step.

    The states that leave the last layer remain, as those that would enter one more; those before are removed.
    """
    start(model, states)
    for index, parameters in Prefetched(model, range(len(model.spec.layers))):
        out = states.create(index + 1)
        for step in run_layer(index, parameters, model.spec.layers[index], states, out):
            yield index, step
        states.finish(index + 1)
        states.remove(index)


@partial(jax.jit, static_argnames="spec")
def embedded(ids, parameters, spec):
    """Return what `embed` does, compiled once."""
    return embed(ids, parameters, spec)


@partial(jax.jit, static_argnames=("spec", "reads"))
def _attended(x, parameters, spec, reads):
    with jax.default_matmul_precision("float32"):
        state = attended(x, parameters, spec)
        return state._replace(reads={name: rows for name, rows in state.reads.items() if name in reads})


@partial(jax.jit, static_argnames=("spec", "shape"))
def _finish(state, parameters, extra, observe, spec, shape):
    with jax.default_matmul_precision("float32"):
        x, seen = finish(state, parameters, spec, shape=shape)
        return x, None if observe is None else observe(seen, extra)


def _not_finite(index: int, x: np.ndarray, state: Attended) -> str:
    bad = ~np.isfinite(x).all(-1).reshape(-1)
    before = np.isfinite(np.asarray(state.residual)).all(-1).reshape(-1)
    where = "its attention" if not before[bad].all() else "its feed-forward block"
    if state.routes is not None and before[bad].all():
        chosen = np.asarray(state.routes.experts)[bad]
        where = f"experts among {', '.join(str(e) for e in sorted(set(chosen.reshape(-1).tolist()))[:8])}"
    return (
        f"layer {index}: NaN or infinite activations at {bad.sum()} tokens, in {where}: the weights are damaged or too"
        " large for float32; fetch or write the checkpoint again"
    )
