"""The sums of a batch against a float64 loop, of layers so wide that second moments are cut into panels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossing import crossed
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.calibration.statistics import FIELDS, kept
from jaxmoe.calibration.sums import POOLED, Summing, _add_panels, _add_whole, _mirrored, gram
from jaxmoe.factors import LayerShape
from jaxmoe.model.layer import Intermediates
from jaxmoe.model.routing import Routes

SHAPE = LayerShape(experts=5, hidden=130, intermediate=70)
TOKENS, CHOICES = 48, 2


def seen(seed=0) -> tuple[Intermediates, np.ndarray]:
    """Return random intermediates, in which expert 3 is never chosen, and which tokens count."""
    rng = np.random.default_rng(seed)
    experts = np.array([rng.choice([0, 1, 2, 4], CHOICES, replace=False) for _ in range(TOKENS)], np.int32)
    rows = {
        "inputs": rng.standard_normal((TOKENS, SHAPE.hidden)),
        "intermediate": rng.standard_normal((TOKENS, CHOICES, SHAPE.intermediate)),
        "outputs": rng.standard_normal((TOKENS, CHOICES, SHAPE.hidden)),
    }
    routes = Routes(jnp.asarray(experts), jnp.asarray(rng.random((TOKENS, CHOICES)), jnp.float32))
    given = {name: jnp.asarray(array, jnp.float32) for name, array in rows.items()}
    return Intermediates(routes=routes, **given), rng.random((3, TOKENS // 3)) < 0.8


def oracle(batch: Intermediates, counted: np.ndarray) -> dict[str, np.ndarray]:
    assert batch.routes is not None
    inputs, intermediate, outputs = (
        np.asarray(array, np.float64) for array in (batch.inputs, batch.intermediate, batch.outputs)
    )
    sums = {name: np.zeros(FIELDS[name].shape(SHAPE)) for name in kept(SHAPE)}
    for token in np.flatnonzero(counted.reshape(-1)):
        x = inputs[token]
        sums["input_moment"] += np.outer(x, x)
        chosen = np.asarray(batch.routes.experts[token])
        for choice, expert in enumerate(chosen):
            w = float(batch.routes.weights[token, choice])
            h, out = intermediate[token, choice], outputs[token, choice]
            sums["counts"][expert] += 1
            sums["weight_sums"][expert] += w
            sums["input_sums"][expert] += x
            sums["output_sums"][expert] += out
            sums["output_norms"][expert] += np.linalg.norm(out)
            sums["weighted_output_norms"][expert] += w * np.linalg.norm(out)
            sums["channel_energies"][expert] += (w * h) ** 2
            sums["channel_peaks"][expert] = np.maximum(sums["channel_peaks"][expert], (w * h) ** 2)
            sums["coactivation"][expert, chosen] += 1
            for name, row in (("input_moments", x), ("intermediate_moments", h)):
                sums[name][expert] += np.outer(row, row)
                sums[f"weighted_{name}"][expert] += w * w * np.outer(row, row)
    return sums


@pytest.mark.parametrize(("span", "jitted"), crossed([(0, 5), (2, 2)], [True, False]))
def test_every_sum_equals_the_loop(span, jitted):
    first, experts = span
    batch, counted = seen()
    summing = Summing(shape=SHAPE, names=kept(SHAPE), experts=experts, first=first)
    run = jax.jit(lambda summing, *batch: summing(*batch)) if jitted else lambda summing, *batch: summing(*batch)
    found = run(summing, batch, jnp.asarray(counted))
    assert sorted(found) == sorted(kept(SHAPE))
    for name, expected in oracle(batch, counted).items():
        rows = expected if name in POOLED else expected[first : first + experts]
        np.testing.assert_allclose(found[name], rows, rtol=2e-5, atol=2e-5, err_msg=name)
        if name.endswith(("moment", "moments")):
            assert np.array_equal(found[name], np.swapaxes(found[name], -1, -2)), "exactly symmetric"


@settings(max_examples=15, deadline=None)
@given(rows=st.sampled_from([1, 9]), size=st.sampled_from([1, 64, 65, 600]), seed=st.integers(0, 99))
def test_a_gram_matrix_in_panels(rows, size, seed):
    values = np.random.default_rng(seed).standard_normal((rows, size)).astype(np.float32)
    found = np.asarray(gram(jnp.asarray(values)))
    np.testing.assert_allclose(found, values.T.astype(np.float64) @ values, rtol=1e-5, atol=1e-5)
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize("size", [64, 200])
def test_one_product_gives_the_same(size):
    """What other platforms than CPU run."""
    total, rows = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    total = jnp.asarray(total + total.swapaxes(1, 2))
    whole, panels = (_mirrored(add(total, 1, jnp.asarray(rows[0]))) for add in (_add_whole, _add_panels))
    np.testing.assert_allclose(whole, panels, rtol=1e-5, atol=1e-5)
    assert np.array_equal(whole[0], total[0])
    assert not np.allclose(whole[1], total[1])
