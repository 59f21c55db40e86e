"""What the experts of one layer read and gave on some text, kept in mapped files while their stand-ins learn.

Memory holds one batch; the files take twice what the hidden states between two layers take, and the chosen experts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.mapped import create_mapped
from jaxmoe.model.auxiliary import by_weight
from jaxmoe.model.layer import Intermediates
from jaxmoe.model.spec import LayerSpec
from jaxmoe.solvers.distillation import Examples
from jaxmoe.streaming import HiddenStates, run_layer


def observe(
    index: int,
    parameters: dict[str, Any],
    spec: LayerSpec,
    states: HiddenStates,
    out: np.ndarray | None,
    counted: np.ndarray,
) -> Examples:
    """Move all states through a layer, and return what its experts read and gave at the tokens that count.

    Args:
        index: of the layer.
        parameters: its arrays, on the device.
        spec: what it computes, all chosen experts running.
        states: of which those at `index` are read.
        out: see `streaming.run_layer`.
        counted: which tokens count, `[window, position]`.
    """
    tokens = int(counted.sum())
    kept: Examples | None = None
    begin = 0
    for step in run_layer(index, parameters, spec, states, out, observe=_EXAMPLES):
        rows = counted[step.windows].reshape(-1)
        batch = [np.asarray(array)[rows] for array in step.observed]
        if kept is None:
            kept = Examples(*(_file(states.folder, tokens, own) for own in batch))
        end = begin + len(batch[0])
        for whole, own in zip(kept, batch):
            whole[begin:end] = own
        begin = end
    assert kept is not None
    return kept


def batches(examples: Examples, order: np.ndarray, size: int) -> Iterator[Examples]:
    """Yield full batches of some tokens in the order of their numbers; the last tokens fill none and are left out."""
    for begin in range(0, len(order) - size + 1, size):
        # Sorted, for the sake of the disk: within a batch the order does not matter.
        yield Examples(*(array[np.sort(order[begin : begin + size])] for array in examples))


def _examples(seen: Intermediates, extra: None) -> Examples:
    assert seen.routes is not None
    assert seen.outputs is not None
    routes = by_weight(seen.routes)
    outputs = jnp.einsum("tk,tkh->th", seen.routes.weights, seen.outputs)
    return Examples(seen.inputs, routes.experts, routes.weights, outputs)


_EXAMPLES = jax.tree_util.Partial(_examples)


def _file(folder: Path, tokens: int, like: np.ndarray) -> np.ndarray:
    return create_mapped(folder, like.dtype.name, (tokens, *like.shape[1:]), named=False)
