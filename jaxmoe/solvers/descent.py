"""One descent on the device: evaluate, compare with the best, then step.

A single `while_loop` runs all steps without the host and stops early on its own: out of patience, at the goal, or at a
loss that is not finite. The best parameters are those whose loss was measured, never those after its step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


class Descent(NamedTuple):
    """Where a descent stands.

    Args:
        best: the parameters of the lowest loss.
        best_loss: that loss; infinite before the first step.
        parameters: the parameters after the last step.
        memory: state of the optimiser.
        losses: loss before each step; NaN from the first step not taken.
        steps: steps taken.
        diverged: whether the last loss was not finite.
    """

    best: Any
    best_loss: Float[Array, ""]
    parameters: Any
    memory: Any
    losses: Float[Array, " step"]
    steps: Int[Array, ""]
    diverged: Bool[Array, ""]


def begin(parameters: Any, optimizer: optax.GradientTransformation, *, steps: int) -> Descent:
    """Return a descent that has taken none of `steps` steps."""
    return Descent(
        best=parameters,
        best_loss=jnp.full((), jnp.inf),
        parameters=parameters,
        memory=optimizer.init(parameters),
        losses=jnp.full(steps, jnp.nan),
        steps=jnp.zeros((), jnp.int32),
        diverged=jnp.zeros((), bool),
    )


def descend(
    evaluate: Callable[[Any], tuple[Float[Array, ""], Any]],
    before: Descent,
    optimizer: optax.GradientTransformation,
    *,
    until: int | Int[Array, ""] | None = None,
    patience: int | None = None,
    goal: float = 0.0,
) -> Descent:
    """Go on with a descent.

    Args:
        evaluate: returns loss and gradient for parameters.
        before: where it stands.
        optimizer: any optax transformation.
        until: steps after which to pause, counted from the beginning; None goes to the end.
        patience: stop after so many steps without a new best loss; None never does.
        goal: stop once the best loss is not above this.

    Example:
        >>> sgd = optax.sgd(0.25)
        >>> after = descend(jax.value_and_grad(lambda x: x**2), begin(jnp.array(8.0), sgd, steps=3), sgd)
        >>> after.losses.tolist(), float(after.best)
        ([64.0, 16.0, 4.0], 2.0)
    """
    steps = before.losses.size
    if not steps:
        return before
    limit = steps if until is None else jnp.minimum(until, steps)

    def unfinished(state):
        now, stale = state
        going = (now.steps < limit) & ~now.diverged & (now.best_loss > goal)
        return going if patience is None else going & (stale < patience)

    def advance(state):
        now, stale = state
        loss, gradient = evaluate(now.parameters)
        better = loss < now.best_loss
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now.parameters, now.best)
        updates, memory = optimizer.update(gradient, now.memory, now.parameters)
        after = Descent(
            best=best,
            best_loss=jnp.where(better, loss, now.best_loss),
            parameters=optax.apply_updates(now.parameters, updates),
            memory=memory,
            losses=now.losses.at[now.steps].set(loss),
            steps=now.steps + 1,
            diverged=~jnp.isfinite(loss),
        )
        return after, jnp.where(better, 0, stale + 1)

    return jax.lax.while_loop(unfinished, advance, (before, jnp.zeros((), jnp.int32)))[0]
