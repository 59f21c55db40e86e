"""The training step: losses, their gradient, and the optimiser, as one pure function of a state and a batch.

The optimiser is AdamW (arXiv 1711.05101) behind a bound of the gradient's norm, its rate warmed up and then taken down
along a cosine, or held and taken down at the end (warm-up, stable, decay: arXiv 2404.06395). A state is a pytree of
arrays: what is trained, the optimiser's memory, the number of steps done and the random key from which the order of the
data follows; with it, training resumes anywhere as if it had never stopped.

Scales, zeros and codebooks of numbers in few bits take steps in units of their own size (the relative steps of
Adafactor, arXiv 1804.04235): they are as small as the weights that they span, and one rate has to do for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.errors import JaxmoeError
from jaxmoe.recovery.losses import Batch, Side, batch_losses, check_weights, count_learned
from jaxmoe.recovery.trainable import is_scale, merge

SCHEDULES = ("cosine", "stable")
DTYPES = ("float32", "bfloat16")
_LARGEST = {"learning_rate": 1e12, "clip": 1e12, "temperature": 1e4}
"""Far above what is of use, and far below where float32 ends."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train.

    Args:
        weights: of the losses by name.
        steps: updates in all.
        rows: of packed documents for an update.
        accumulate: parts into which these are cut, one after the other, to save memory; a divisor of `rows`.
        learning_rate: the highest.
        schedule: "cosine" (down to a tenth) or "stable" (held, then linearly down to nothing in the last fifth).
        warmup: fraction of the steps in which the rate rises.
        weight_decay: of matrices; vectors have none.
        clip: bound of the gradient's norm.
        temperature: of distillation.
        dtype: of the computation; what is trained is float32 in any.
        rematerialize: whether the backward pass computes every layer again instead of keeping what is inside: a third
            more work, far less memory.

    Example:
        >>> Training(steps=100).weights
        {'next_token': 1.0}
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"next_token": 1.0})
    steps: int = 200
    rows: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    temperature: float = 1.0
    dtype: str = "float32"
    rematerialize: bool = False

    def __post_init__(self):
        check_weights(self.weights)
        for name in ("steps", "rows", "accumulate"):
            if not 1 <= getattr(self, name) < 2**31:
                raise JaxmoeError(f"{name} {getattr(self, name)}: give at least 1, at most 2147483647")
        if self.rows % self.accumulate:
            raise JaxmoeError(f"{self.rows} rows cannot be cut into {self.accumulate} equal parts: give a divisor")
        for name, most in _LARGEST.items():
            if not 0 < getattr(self, name) <= most:
                raise JaxmoeError(f"{name} {getattr(self, name)}: give a positive number, at most {most:g}")
        if not 0 <= self.warmup < 1:
            raise JaxmoeError(f"warmup {self.warmup}: give a fraction of the steps, at least 0 and below 1")
        # The part of a matrix that a step takes away.
        if not 0 <= self.weight_decay * self.learning_rate < 1:
            raise JaxmoeError(
                f"weight_decay {self.weight_decay}: give a number that is not negative and below"
                f" {1 / self.learning_rate:g}, with which a step at learning_rate {self.learning_rate:g} takes all of a"
                " matrix away"
            )
        for name, known in (("schedule", SCHEDULES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise JaxmoeError(f"{name} {getattr(self, name)!r}: give {' or '.join(known)}")


class State(NamedTuple):
    """Everything that a step changes: `trained` in float32 by name, the optimiser's memory, steps done; and the key."""

    trained: dict[str, Array]
    optimizer: Any
    step: Array
    key: Array


def learning_rate(training: Training) -> optax.Schedule:
    """Return the rate at every step.

    Example:
        >>> rate = learning_rate(Training(steps=100, learning_rate=1.0, warmup=0.1))
        >>> [round(float(rate(step)), 2) for step in (0, 10, 100)]
        [0.1, 1.0, 0.1]
    """
    top, steps = training.learning_rate, training.steps
    warm = round(training.warmup * steps)
    if training.schedule == "cosine":
        rest = optax.cosine_decay_schedule(top, max(1, steps - warm), alpha=0.1)
    else:
        last = max(1, steps // 5)
        rest = optax.join_schedules(
            [optax.constant_schedule(top), optax.linear_schedule(top, 0.0, last)], [max(0, steps - warm - last)]
        )
    # The first step already has a rate.
    return optax.join_schedules([optax.linear_schedule(top / max(1, warm), top, max(1, warm)), rest], [warm])


def optimizer(training: Training) -> optax.GradientTransformation:
    """Return AdamW with the bound and the schedule of a training, for arrays by name."""

    def matrices(trained):
        return {name: x.ndim > 1 and not is_scale(name) for name, x in trained.items()}

    return optax.chain(
        optax.clip_by_global_norm(training.clip),
        optax.adamw(learning_rate(training), b2=0.99, weight_decay=training.weight_decay, mask=matrices),
        optax.stateless(_in_own_units),
    )


def _in_own_units(updates: Any, trained: Any) -> Any:
    """Return the updates, those of scales, zeros and codebooks times the size of their rows."""

    def own(name: str, update: Array) -> Array:
        if not is_scale(name):
            return update
        array = trained[name]
        update = update * jnp.sqrt(jnp.mean(jnp.square(array), -1, keepdims=True))
        # At most halved in a step, a scale stays above zero.
        return jnp.maximum(update, -array / 2) if name.endswith(".scale") else update

    return {name: own(name, update) for name, update in updates.items()}


def begin(trained: dict[str, Array], training: Training, seed: int = 0) -> State:
    """Return the state before the first step."""
    key = jax.random.key_data(jax.random.key(seed))
    return State(trained, optimizer(training).init(trained), jnp.zeros((), jnp.int32), key)


def batch_rows(state_key: Array, step: int, rows: int, count: int) -> np.ndarray:
    """Return which rows a step takes: every pass over the data has an order of its own, and no row is left out.

    Args:
        state_key: key data of a state.
        step: number of the step, from 0.
        rows: that a step takes.
        count: of all rows.

    Example:
        >>> key = jax.random.key_data(jax.random.key(0))
        >>> first, second = (batch_rows(key, step, 2, 4) for step in (0, 1))
        >>> sorted([*first.tolist(), *second.tolist()])
        [0, 1, 2, 3]
    """
    positions = np.arange(step * rows, (step + 1) * rows)
    orders = {
        int(epoch): np.asarray(
            jax.random.permutation(jax.random.fold_in(jax.random.wrap_key_data(state_key), epoch), count)
        )
        for epoch in np.unique(positions // count)
    }
    return np.array([orders[int(p // count)][p % count] for p in positions])


def train_step(
    state: State, frozen: Any, teacher: Any, batch: Batch, *, specs: tuple[Any, Any], training: Training
) -> tuple[State, dict[str, Float[Array, ""]]]:
    """Do one update.

    Args:
        state: before it.
        frozen: the student's parameters; those that are trained are taken from the state instead.
        teacher: the teacher's parameters, None without.
        batch: `training.rows` rows.
        specs: of student and teacher; like `training` no arrays: bind them before compiling.
        training: how to train.

    Returns:
        The state after it, and `loss`, each loss by name, `gradient_norm` and `learning_rate`.
    """
    wanted, dtype = tuple(training.weights), jnp.dtype(training.dtype)
    # Parts hold different numbers of learned tokens: all are divided by the same one, so that cutting changes nothing.
    share = count_learned(batch) / training.accumulate

    def total(trained, part: Batch):
        student = Side(merge(frozen, trained), specs[0])
        other = None if teacher is None else Side(teacher, specs[1])
        found = batch_losses(
            student,
            other,
            part,
            wanted=wanted,
            counted=share,
            temperature=training.temperature,
            dtype=dtype,
            rematerialize=training.rematerialize,
        )
        return sum(training.weights[name] * value for name, value in found.items()), found

    def add(sums, part: Batch):
        (loss, found), gradient = jax.value_and_grad(total, has_aux=True)(state.trained, part)
        return jax.tree.map(jnp.add, sums, (gradient, {"loss": loss, **found})), None

    parts = jax.tree.map(lambda x: x.reshape(training.accumulate, -1, *x.shape[1:]), batch)
    zeros = jax.tree.map(jnp.zeros_like, state.trained), dict.fromkeys(("loss", *wanted), jnp.zeros(()))
    (gradient, found), _ = lax.scan(add, zeros, parts)
    gradient, found = jax.tree.map(lambda x: x / training.accumulate, (gradient, found))
    updates, memory = optimizer(training).update(gradient, state.optimizer, state.trained)
    found |= {"gradient_norm": optax.tree.norm(gradient), "learning_rate": learning_rate(training)(state.step)}
    trained = jax.tree.map(jnp.add, state.trained, updates)
    return State(trained, memory, state.step + 1, state.key), found
