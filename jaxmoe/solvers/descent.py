"""One descent on the device: evaluate, compare with the best, then step or return.

A single `while_loop` runs all steps without the host and stops early on its own: out of patience, at the goal, or where
nothing finite was found. The best parameters are those whose loss was measured, never those after its step.

Long steps are what finds the valley, and they can leave it: the loss jumps to many times its best and does not come
back. So a loss above `rise` times the best ends in a return: parameters and the optimiser's memory become again what
they were where the best was measured, and the rate is halved for good. The place in the schedule is the number of steps
taken, which no return turns back.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.arrays import AnyArray, Scalar

SHRINK = 0.5
"""Factor on the rate at every return."""

MOST_RETURNS = 24
"""Returns after which a descent stops: a rate of 2^-24 of the first moves nothing in float32."""


class Descent(NamedTuple):
    """Where a descent stands.

    Args:
        best: the parameters of the lowest loss.
        best_memory: state of the optimiser when it came to them; kept by descents that can return.
        best_loss: that loss; infinite before the first step.
        parameters: the parameters after the last step.
        memory: state of the optimiser.
        rate: of the steps to come.
        losses: loss before each step; NaN from the first step not taken.
        steps: steps taken, returns among them.
        stale: steps taken since the best loss.
        returns: times that it returned to the best.
        diverged: whether it ended at a loss that is not finite and had nowhere to return to.
    """

    best: Any
    best_memory: Any
    best_loss: Float[Array, ""]
    parameters: Any
    memory: Any
    rate: Float[Array, ""]
    losses: Float[Array, " step"]
    steps: Int[Array, ""]
    stale: Int[Array, ""]
    returns: Int[Array, ""]
    diverged: Bool[Array, ""]


def begin(
    parameters: Any, direction: optax.GradientTransformation, *, rate: float | Float[AnyArray, ""], steps: int
) -> Descent:
    """Return a descent that has taken none of `steps` steps."""
    memory = direction.init(parameters)
    none = jnp.zeros((), jnp.int32)
    return Descent(
        best=parameters,
        best_memory=memory,
        best_loss=jnp.full((), jnp.inf),
        parameters=parameters,
        memory=memory,
        rate=jnp.asarray(rate, jnp.float32),
        losses=jnp.full(steps, jnp.nan),
        steps=none,
        stale=none,
        returns=none,
        diverged=jnp.zeros((), bool),
    )


def either(condition: Bool[AnyArray, ""], first: Any, second: Any) -> Any:
    """Return the first of two equal pytrees where the condition holds, else the second."""
    return jax.tree.map(partial(jnp.where, condition), first, second)


def descend(
    evaluate: Callable[[Any], tuple[Float[AnyArray, ""], Any]],
    before: Descent,
    direction: optax.GradientTransformation,
    *,
    schedule: Callable[[Int[AnyArray, ""]], Any] = lambda step: 1.0,
    until: int | Int[AnyArray, ""] | None = None,
    patience: int | None = None,
    goal: float = 0.0,
    rise: Scalar | None = None,
    rounding: float = 0.0,
) -> Descent:
    """Continue a descent.

    Args:
        evaluate: returns loss and gradient for parameters.
        before: where it stands.
        direction: any optax transformation without a rate of its own, such as `optax.scale_by_adam()`.
        schedule: factor on the rate at each step.
        until: steps after which to pause, counted from the beginning; None goes to the end.
        patience: stop after so many steps without a new best loss; None never does.
        goal: stop once the best loss is not above this.
        rise: return to the best, with a smaller rate, where the loss is above so many times the best or not finite;
            None never returns, and stops at a loss that is not finite.
        rounding: loss below which differences mean nothing, so that no rise is seen there.

    Example:
        >>> plain, square = optax.identity(), jax.value_and_grad(lambda x: x**2)
        >>> after = descend(square, begin(jnp.array(8.0), plain, rate=0.25, steps=3), plain)
        >>> after.losses.tolist(), float(after.best)
        ([64.0, 16.0, 4.0], 2.0)
        >>> after = descend(square, begin(jnp.array(1.0), plain, rate=1.5, steps=4), plain, rise=1.5)
        >>> after.losses.tolist(), int(after.returns), float(after.rate)
        ([1.0, 4.0, 1.0, 0.25], 1, 0.75)
    """
    steps = before.losses.size
    if not steps:
        return before
    limit = steps if until is None else jnp.minimum(until, steps)

    def unfinished(now):
        going = (now.steps < limit) & ~now.diverged & (now.best_loss > goal) & (now.returns < MOST_RETURNS)
        return going if patience is None else going & (now.stale < patience)

    def advance(now):
        loss, gradient = evaluate(now.parameters)
        better = loss < now.best_loss
        best_loss = jnp.where(better, loss, now.best_loss)
        best = either(better, now.parameters, now.best)
        updates, memory = direction.update(gradient, now.memory, now.parameters)
        length = now.rate * schedule(now.steps)
        after = now._replace(
            best=best,
            best_loss=best_loss,
            parameters=jax.tree.map(lambda x, update: x - length * update, now.parameters, updates),
            memory=memory,
            losses=now.losses.at[now.steps].set(loss),
            steps=now.steps + 1,
            stale=jnp.where(better, 0, now.stale + 1),
        )
        if rise is None:
            return after._replace(diverged=~jnp.isfinite(loss))
        best_memory = either(better, now.memory, now.best_memory)
        found = jnp.isfinite(best_loss)
        risen = found & (~jnp.isfinite(loss) | (loss > rise * jnp.maximum(best_loss, rounding)))
        return after._replace(
            best_memory=best_memory,
            parameters=either(risen, best, after.parameters),
            memory=either(risen, best_memory, memory),
            rate=jnp.where(risen, SHRINK * now.rate, now.rate),
            returns=now.returns + risen,
            diverged=~found,
        )

    return jax.lax.while_loop(unfinished, advance, before)
