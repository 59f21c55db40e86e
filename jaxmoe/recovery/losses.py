"""What training minimises: how well a model predicts its text, and how far it is from the model it was made from.

    next_token    mean over tokens of -log p(token | those before it)
    distillation  T^2 KL(teacher || student) of the next token's distribution at temperature T (arXiv 1503.02531)
    outputs       mean over layers of |x - x_teacher|^2 / |x_teacher|^2, x the hidden states that leave a layer
    balance       mean over layers of E sum_e f_e p_e: load of an expert times its mean probability (arXiv 2101.03961)

All are means over what counts of a batch, in nats where they are likelihoods, and are added up with weights. Logits are
formed for some tokens at a time, and again in the backward pass: those of a batch may be larger than the model.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.decoder import embed, head
from jaxmoe.model.layer import Intermediates, layer
from jaxmoe.model.routing import router_logits
from jaxmoe.model.spec import DecoderSpec, ExpertBlock, LayerSpec

LOSSES = ("next_token", "distillation", "outputs", "balance")
TAUGHT = ("distillation", "outputs")
"""The losses that need a teacher."""
_LARGEST = 1e6
"""Weight that a loss can have, far above what is of use."""

LOGITS = 1 << 24
"""Numbers of logits that are formed at a time."""


class Batch(NamedTuple):
    """Rows of packed documents, see `texts.packing.Rows`."""

    ids: Int[Array | np.ndarray, "row position"]
    documents: Int[Array | np.ndarray, "row position"]
    learned: Bool[Array | np.ndarray, "row position"]


class Side(NamedTuple):
    """A model and its parameters; `spec` is static."""

    parameters: Any
    spec: DecoderSpec


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise unless the weights of some losses make sense.

    Example:
        >>> check_weights({"guess": 1.0})
        Traceback (most recent call last):
        ...
        jaxmoe.errors.JaxmoeError: loss 'guess': give some of next_token, distillation, outputs, balance
    """
    for name, weight in weights.items():
        if name not in LOSSES:
            raise JaxmoeError(f"loss {name!r}: give some of {', '.join(LOSSES)}")
        if not 0 < weight <= _LARGEST:
            raise JaxmoeError(f"loss {name}={weight}: give a positive weight, at most {_LARGEST:g}")
    if not weights.keys() - {"balance"}:
        raise JaxmoeError(f"nothing to learn from: give some of {', '.join(LOSSES[:-1])}")


def count_learned(batch: Batch) -> Float[Array, ""]:
    """Return how many tokens of a batch are predicted: those to be learned that follow one of their document."""
    return jnp.maximum(1.0, jnp.sum(_counted(batch), dtype=jnp.float32))


def _counted(batch: Batch) -> Bool[Array, "row position"]:
    documents, learned = jnp.asarray(batch.documents), jnp.asarray(batch.learned)
    return learned[:, 1:] & (documents[:, 1:] == documents[:, :-1])


def batch_losses(
    student: Side,
    teacher: Side | None,
    batch: Batch,
    *,
    wanted: tuple[str, ...],
    counted: Float[AnyArray, ""] | float | None = None,
    temperature: float = 1.0,
    dtype: Any = jnp.float32,
    rematerialize: bool = False,
) -> dict[str, Float[Array, ""]]:
    """Return the losses of a batch by name, differentiable in the student's parameters.

    Args:
        student: the model in training.
        teacher: the model that it is to be like, of the same vocabulary, hidden size and layers (`outputs`).
        batch: the text.
        wanted: which losses.
        counted: by how many tokens sums over learned tokens are divided; by default as many as there are.
        temperature: of the distributions that distillation compares.
        dtype: of the computation; logits, probabilities and routing are float32 in any.
        rematerialize: whether the backward pass computes every layer again, so that only what enters a layer is kept.
    """
    run = partial(_run, batch=batch, dtype=dtype, keep="outputs" in wanted, again=rematerialize)
    x, passed, balance = run(student, balance="balance" in wanted)
    found = {}
    if "balance" in wanted:
        found["balance"] = balance
    taught = None
    if teacher is not None and set(wanted) & set(TAUGHT):
        taught, aims, _ = jax.tree.map(lax.stop_gradient, run(teacher, balance=False))
        if "outputs" in wanted:
            within = (batch.documents > 0)[..., None]
            found["outputs"] = _apart(passed, aims, within)
    if {"next_token", "distillation"} & set(wanted):
        nats, divergence = _likelihoods(student, x, teacher, taught, batch, temperature)
        count = count_learned(batch) if counted is None else counted
        found |= {"next_token": nats / count, "distillation": divergence / count}
    return {name: found[name] for name in LOSSES if name in wanted}


def _run(side: Side, *, batch: Batch, dtype, keep: bool, again: bool, balance: bool):
    """Return the hidden states that leave the last layer, perhaps those of all layers, and the balance loss."""
    spec = side.spec
    x = embed(jnp.asarray(batch.ids), side.parameters, spec).astype(dtype)
    kept, loads = [], []
    for own, rules in zip(side.parameters["layers"], spec.layers, strict=True):
        run = partial(_layer, documents=batch.documents, spec=rules, balance=balance)
        x, load = (jax.checkpoint(run) if again else run)(x, own)
        if keep:
            kept.append(x)
        if load is not None:
            loads.append(load)
    return x, kept, sum(loads) / max(1, len(loads))


def _layer(x, parameters, *, documents, spec: LayerSpec, balance: bool):
    out, seen = layer(x, parameters, spec, documents=documents)
    return out, _load(seen, parameters, documents, spec) if balance else None


def _load(seen: Intermediates, parameters, documents, spec: LayerSpec):
    if not isinstance(spec.feed_forward, ExpertBlock) or seen.routes is None:
        return None
    router = spec.feed_forward.router
    within = (documents > 0).reshape(-1, 1).astype(jnp.float32)
    tokens = jnp.maximum(1.0, jnp.sum(within))
    chances = jax.nn.softmax(router_logits(seen.inputs, parameters, router), -1)
    mean = jnp.sum(chances * within, 0) / tokens
    chosen = jax.nn.one_hot(seen.routes.experts, router.experts).sum(1)
    return router.experts * jnp.sum(mean * jnp.sum(chosen * within, 0) / (tokens * seen.routes.experts.shape[1]))


def _apart(passed, aims, within):
    """Return the mean over layers of the relative squared distance of hidden states."""
    ratios = []
    for own, aim in zip(passed, aims, strict=True):
        own, aim = (jnp.where(within, part.astype(jnp.float32), 0) for part in (own, aim))
        ratios.append(jnp.sum(jnp.square(own - aim)) / jnp.sum(jnp.square(aim)))
    return sum(ratios) / len(ratios)


def _likelihoods(student: Side, x, teacher: Side | None, taught, batch: Batch, temperature: float):
    """Return sums over the learned tokens of their negative log-likelihood and of the divergence."""
    targets = batch.ids[:, 1:].reshape(-1)
    counted = _counted(batch).reshape(-1)
    size = max(1, min(len(targets), LOGITS // student.spec.vocabulary))
    blocks = -(-len(targets) // size)

    def cut(array):
        filled = jnp.pad(array, [(0, blocks * size - len(array)), *[(0, 0)] * (array.ndim - 1)])
        return filled.reshape(blocks, size, *array.shape[1:])

    def flat(hidden):
        return cut(hidden[:, :-1].reshape(-1, hidden.shape[-1]))

    @jax.checkpoint
    def block(ends, x, taught, targets, counted):
        logits = head(x, ends, student.spec).astype(jnp.float32)
        # Not `take_along_axis`, whose gradient writes one number after the other.
        target = jnp.sum(jnp.where(targets[:, None] == jnp.arange(logits.shape[-1]), logits, 0), -1)
        nats = jax.nn.logsumexp(logits, -1) - target
        divergence = jnp.zeros(())
        if taught is not None and teacher is not None:
            aim = jax.nn.log_softmax(head(taught, teacher.parameters, teacher.spec).astype(jnp.float32) / temperature)
            own = jax.nn.log_softmax(logits / temperature)
            divergence = temperature**2 * jnp.sum(jnp.where(counted, jnp.sum(jnp.exp(aim) * (aim - own), -1), 0))
        return jnp.sum(jnp.where(counted, nats, 0)), divergence

    ends = {name: array for name, array in student.parameters.items() if name != "layers"}
    parts = (flat(x), None if taught is None else flat(taught), cut(targets), cut(counted))
    nats, divergence = lax.map(lambda own: block(ends, *own), parts)
    return jnp.sum(nats), jnp.sum(divergence)


def loss_weights(text: str) -> dict[str, float]:
    """Return the losses that `NAME[=WEIGHT],...` names, by weight.

    Example:
        >>> loss_weights("distillation,balance=0.01")
        {'distillation': 1.0, 'balance': 0.01}
    """
    weights = {}
    for part in text.split(","):
        name, separator, weight = part.partition("=")
        try:
            weights[name] = float(weight) if separator else 1.0
        except ValueError:
            raise JaxmoeError(f"--loss {text}: {weight!r} is no number; give NAME or NAME=WEIGHT") from None
    return weights
