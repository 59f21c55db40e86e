"""The loop of a descent: what is kept, when it returns, and that pausing it changes nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmoe.solvers.descent import MOST_RETURNS, SHRINK, begin, descend

ADAM = optax.scale_by_adam(b1=0.8, b2=0.9)
START = (jnp.array([2.0, -1.0, 0.5]), jnp.array(3.0))


def valley(parameters):
    """Steep and flat at once, with a cliff: long steps are thrown out of it."""
    x, y = parameters
    return jnp.sum(jnp.array([1.0, 30.0, 900.0]) * x**2) + jnp.log1p(y**2) + 1e-2


EVALUATE = jax.value_and_grad(valley)


def by_hand(start, rate, steps, rise, schedule):
    """The descent as a plain loop in Python."""
    parameters, memory = start, ADAM.init(start)
    best, kept, best_loss = parameters, memory, np.inf
    losses, returns = [], 0
    for step in range(steps):
        loss, gradient = EVALUATE(parameters)
        losses.append(float(loss))
        if losses[-1] < best_loss:
            best, kept, best_loss = parameters, memory, losses[-1]
        if np.isfinite(losses[-1]) and losses[-1] <= rise * best_loss:
            updates, memory = ADAM.update(gradient, memory)
            parameters = optax.apply_updates(parameters, optax.tree.scale(-rate * schedule(step), updates))
        else:
            parameters, memory, rate, returns = best, kept, rate / 2, returns + 1
    return best, losses, returns


def falling(step):
    return 1 - step / 120


def test_it_is_the_plain_loop():
    begun = begin(START, ADAM, rate=0.7, steps=120)
    found = descend(EVALUATE, begun, ADAM, rise=1.5, schedule=falling)
    best, losses, returns = by_hand(START, 0.7, 120, 1.5, falling)
    assert returns >= 3
    assert (int(found.returns), float(found.rate)) == (returns, pytest.approx(0.7 * SHRINK**returns))
    np.testing.assert_allclose(found.losses, losses, rtol=1e-3)
    for got, wanted in zip(found.best, best):
        np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert float(valley(found.best)) == float(found.best_loss) == float(found.losses.min())
    never = descend(EVALUATE, begun, ADAM, schedule=falling)
    assert int(never.returns) == 0
    assert float(never.rate) == pytest.approx(0.7)
    assert float(found.best_loss) < float(never.best_loss)


def test_a_return_restores_parameters_and_memory():
    begun = begin(START, ADAM, rate=0.7, steps=120)
    walk = partial(descend, EVALUATE, direction=ADAM, rise=1.5)
    jumped = next(step for step in range(120) if int(walk(begun, until=step + 1).returns))
    after = walk(begun, until=jumped + 1)
    back = walk(begun, until=int(jnp.argmin(after.losses[: jumped + 1])))
    jax.tree.map(np.testing.assert_array_equal, (after.parameters, after.memory), (back.parameters, back.memory))
    assert int(after.steps) == jumped + 1
    assert float(after.losses[jumped]) > 1.5 * float(after.best_loss)


@pytest.mark.parametrize("patience", [None, 4])
def test_pauses_and_jit_change_nothing(patience):
    begun = begin(START, ADAM, rate=0.7, steps=120)
    walk = partial(descend, EVALUATE, direction=ADAM, rise=1.5, schedule=falling, patience=patience)
    whole = walk(begun)
    paused = begun
    for until in (1, 7, 8, 50, 120):
        paused = walk(paused, until=until)
    jitted = jax.jit(walk)(begun)
    for other in (paused, walk(begun)):
        jax.tree.map(np.testing.assert_array_equal, whole, other)
    assert int(whole.steps) == int(jitted.steps)
    np.testing.assert_allclose(whole.best_loss, jitted.best_loss, rtol=1e-3)
    if patience:
        assert int(whole.stale) == patience
        assert int(whole.steps) < 120


def test_losses_that_are_not_finite():
    edge = jax.value_and_grad(lambda x: jnp.where(x < 0, jnp.nan, x))
    plain = optax.identity()
    found = descend(edge, begin(jnp.array(1.0), plain, rate=0.7, steps=40), plain, rise=1.5)
    # It comes as near to the edge as ever shorter steps do.
    assert 0 <= float(found.best) < 1e-2
    assert int(found.returns) > 2
    assert not bool(found.diverged)
    cliff = jax.value_and_grad(lambda x: jnp.where(x < 0, jnp.inf, x))
    assert int(descend(cliff, begin(jnp.array(1.0), plain, rate=0.7, steps=9), plain, rise=jnp.inf).returns) > 0
    broken = jax.value_and_grad(lambda x: x * jnp.nan)
    for rise in (None, 1.5):
        nothing = descend(broken, begin(jnp.array(1.0), plain, rate=0.7, steps=40), plain, rise=rise)
        assert bool(nothing.diverged)
        assert (int(nothing.steps), int(nothing.returns), float(nothing.best)) == (1, 0, 1.0)
    stopped = descend(edge, begin(jnp.array(1.0), plain, rate=2.0, steps=40), plain)
    assert bool(stopped.diverged)
    assert (int(stopped.steps), float(stopped.best)) == (2, 1.0)


def test_returns_without_progress_come_to_an_end():
    def hopeless(x):
        return 1 + jnp.sum(x), jnp.full_like(x, jnp.nan)

    plain = optax.identity()
    found = descend(hopeless, begin(jnp.zeros(2), plain, rate=1.0, steps=1000), plain, rise=1.5)
    assert int(found.returns) == MOST_RETURNS
    assert int(found.steps) < 100
    np.testing.assert_array_equal(found.best, 0)


def test_rounding_is_no_rise():
    noisy = jnp.array([1.0, 1e-8, 9e-7, 2e-8, 5e-8])
    plain = optax.identity()

    def evaluate(x):
        return noisy[x.astype(int)], -jnp.ones_like(x)

    walk = partial(descend, evaluate, begin(jnp.array(0.0), plain, rate=1.0, steps=5), plain, rise=1.5)
    assert int(walk(rounding=1e-6).returns) == 0
    assert int(walk(rounding=0.0).returns) > 0
