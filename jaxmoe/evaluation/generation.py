"""Greedy continuations, without a cache of keys and values: the whole batch is run again for every token.

That is slow for long texts, and needs nothing that the streamed forward pass does not have. All steps share one program
for each kind of layer, since sequences are padded at their ends to the final length, which changes nothing before.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.evaluation.windows import check_finite, score_rows
from jaxmoe.model.layer import layer
from jaxmoe.streaming import Prefetched, embedded, on_device

IN_MEMORY = 2_000_000_000
"""Bytes of a checkpoint up to which all layers stay in memory; those of larger ones are read again for every token."""


def continuations(
    model: StoredModel, prompts: Sequence[np.ndarray], new: int, *, width: int | None = None
) -> Iterator[np.ndarray]:
    """Yield the next token of every prompt, the likeliest each time.

    Args:
        model: on disk.
        prompts: token ids, at least one each.
        new: most tokens to yield.
        width: what sequences are padded to, at least the longest with its new tokens, which is taken if None.

    Raises:
        JaxmoeError: logits are not finite.

    Example:
        >>> from jaxmoe.data import demo_checkpoint
        >>> steps = continuations(StoredModel(demo_checkpoint()), [np.array([5]), np.array([6, 7])], 2)
        >>> [len(tokens) for tokens in steps]
        [2, 2]
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((len(prompts), width or int(lengths.max()) + new), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    table = on_device(model.ends("embedding.weight"))
    layers = _layers(model)
    unknown = jnp.zeros(len(ids), jnp.int32)
    for _ in range(new):
        x = embedded(ids, table, spec=model.spec)
        for index, parameters in layers:
            x = _layer(x, parameters, spec=model.spec.layers[index])
        scores = score_rows(model, unknown, x[np.arange(len(ids)), lengths - 1])
        check_finite(model, np.asarray(scores.nats))
        tokens = np.asarray(scores.top)
        ids[np.arange(len(ids)), lengths] = tokens
        lengths += 1
        yield tokens


def _layers(model: StoredModel) -> Iterable[tuple[int, dict[str, Any]]]:
    layers = Prefetched(model, range(len(model.spec.layers)))
    return list(layers) if model.checkpoint.bytes <= IN_MEMORY else layers


@partial(jax.jit, static_argnames="spec")
def _layer(x, parameters, spec):
    with jax.default_matmul_precision("float32"):
        return layer(x, parameters, spec)[0]
