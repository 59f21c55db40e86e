"""What a report says of how bases were found: each event of a descent is a record of its own kind."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.methods.mixture import descent_outcomes
from jaxmoe.solvers.mixture import BasisFit


def found(losses, rates=(0.3, 0.3, 0.3), returns=0, diverged=False):
    nothing = jnp.zeros((1, 1, 1))
    steps = int(np.sum(~np.isnan(losses))) + diverged
    counts = (jnp.array(steps), jnp.array(rates, jnp.float32), jnp.array(returns), jnp.array(diverged))
    return BasisFit(nothing, nothing, nothing[0], jnp.zeros(()), jnp.zeros(1), jnp.array(losses), *counts)


@pytest.mark.parametrize(
    ("fit", "kinds", "words"),
    [
        (found([]), ["not_fitted"], ""),
        (found([1.0, 0.5, 0.25]), [], ""),
        (found([1.0, 0.25, np.nan], diverged=True), ["diverged"], "after 3 steps"),
        (found([1.0, 0.5], rates=(0.3, 0.09, 0.09)), ["lower_rate"], "at rate 0.3: the rate became 0.09"),
        (found([1.0, 0.5], rates=(0.3, 0.3, 0.075), returns=2), ["descent_returned"], "2 times"),
        (found([1.0, 0.04, 0.16, np.nan]), ["ended_above_best"], "error 0.4000; the best, 0.2000"),
        (found([1.0, 1e-8, 1e-7]), [], ""),
        (
            found([1.0, 0.04, 0.16], rates=(0.3, 0.03, 0.015), returns=1),
            ["lower_rate", "descent_returned", "ended_above_best"],
            "at last 0.015 in place of 0.03",
        ),
    ],
)
def test_kinds(fit, kinds, words):
    outcomes = descent_outcomes(fit)
    assert [outcome.kind for outcome in outcomes] == kinds
    assert words in " ".join(outcome.detail for outcome in outcomes)
