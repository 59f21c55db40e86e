"""Truncated SVD against numpy in float64: plain, weighted as published, and with the ranks shared among the experts."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_fits import SHAPE, WEIGHTS, fitted, materialized, moments, relative

from jaxmoe import methods
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Grouped, LowRank
from jaxmoe.methods.svd import SVDSettings, break_even

SVD = methods.get("svd")


@pytest.mark.parametrize("target", ["gate", "up", "down"])
def test_equals_numpy(target):
    result, weight = fitted("svd", target, level=5, setting="paper")
    tail = np.linalg.svd(weight.astype(np.float64), compute_uv=False)[:, 5:]
    assert relative(result, weight) == pytest.approx(np.linalg.norm(tail) / np.linalg.norm(weight), rel=1e-4)


@pytest.mark.parametrize("target", ["gate_up", "down"])
def test_improved_keeps_the_largest_singular_values_of_all_experts(target):
    uneven = {
        name: weight * np.linspace(0.8, 1.25, 6, dtype=np.float32)[:, None, None] for name, weight in WEIGHTS.items()
    }
    result, weight = fitted("svd", target, uneven, level=30)
    values = np.sort(np.linalg.svd(weight.astype(np.float64), compute_uv=False).ravel())
    assert relative(result, weight) == pytest.approx(np.linalg.norm(values[:-30]) / np.linalg.norm(values), rel=1e-4)
    ranks = result.terms[0].group_ranks
    assert sum(ranks) == 30
    assert ranks[0] < ranks[-1]


def test_weighted_by_inputs_serves_those_inputs():
    rng = np.random.default_rng(1)
    inputs = (rng.normal(size=(4000, 32)) * np.geomspace(3, 0.01, 32)).astype(np.float32)
    moment = (inputs.T @ inputs / len(inputs))[None]
    plain, weight = fitted("svd", "gate_up", level=24)
    aware, _ = fitted("svd", "gate_up", level=24, moment=jnp.asarray(moment))

    def output_error(result):
        return np.linalg.norm(np.einsum("ti,eoi->eto", inputs, materialized(result) - weight))

    assert output_error(aware) < 0.9 * output_error(plain)
    assert relative(aware, weight) > relative(plain, weight)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("target", ["gate", "down"])
def test_weighted_factors_are_the_published_ones(target, shared):
    """SVD-LLM: truncate W S, S S' = C, and take S off again."""
    _, moment = moments(SHAPE.of(target)[2], shared=shared)
    result, weight = fitted("svd", target, level=5, moment=jnp.asarray(moment), setting="paper")
    for own, found, expert in zip(np.broadcast_to(moment, (6, *moment.shape[1:])), materialized(result), weight):
        factor = np.linalg.cholesky(own)
        u, s, v = np.linalg.svd(expert @ factor)
        expected = (u[:, :5] * s[:5]) @ v[:5] @ np.linalg.inv(factor)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        rest = expert - found
        assert np.trace(rest @ own @ rest.T) == pytest.approx(np.sum(s[5:] ** 2), rel=1e-4)


def test_improved_ranks_follow_the_weighted_spectra():
    _, moment = moments(20, shared=False)
    moment = moment * np.geomspace(0.1, 10, 6)[:, None, None]
    result, weight = fitted("svd", "down", level=30, moment=jnp.asarray(moment))
    spectra = np.linalg.svd(weight @ np.linalg.cholesky(moment), compute_uv=False) ** 2
    # Every expert has a rank of at least one; the others go where they keep the most energy.
    level = np.sort(spectra[:, 1:].ravel())[-(30 - 6)]
    assert result.terms[0].group_ranks == tuple((spectra[:, 1:] >= level).sum(1) + 1)


@pytest.mark.parametrize(
    ("setting", "targets", "kind", "numbers"),
    [
        ("paper", ["gate", "up", "down"], LowRank, {"gate": 6 * 7 * (32 + 20), "down": 6 * 7 * (32 + 20)}),
        ("improved", ["gate_up", "down"], Grouped, {"gate_up": 42 * (32 + 40) + 6, "down": 42 * (32 + 20) + 6}),
    ],
)
def test_what_is_stored(setting, targets, kind, numbers):
    chosen = SVDSettings(setting=setting)
    assert list(SVD.targets(SHAPE, chosen)) == targets
    for target, expected in numbers.items():
        slot = SVD.slot(target, SHAPE, np.dtype("float32"), chosen, 0.5)
        result, _ = fitted("svd", target, level=7 if setting == "paper" else 42, setting=setting)
        (term,) = result.terms
        assert type(term) is kind
        assert term.count().numbers == expected == sum(array.size for array in term.tensors().values())
        most = slot.ladder()
        assert most.numbers(most.high) < most.dense
        if setting == "paper":
            assert most.numbers(most.high) + most.step >= most.dense


def test_zeros_stay_zeros():
    nothing = {name: np.zeros_like(weight) for name, weight in WEIGHTS.items()}
    result, _ = fitted("svd", "down", nothing, level=12)
    assert not materialized(result).any()


def test_break_even_is_the_last_rank_that_saves():
    for shape in ((4, 64, 128), (4, 128, 64), (4, 100, 100), (2, 768, 2048)):
        rank, dense = break_even(shape), shape[0] * shape[1] * shape[2]
        assert LowRank.abstract(shape, "float32", rank=rank).count().numbers < dense
        assert LowRank.abstract(shape, "float32", rank=rank + 1).count().numbers >= dense


def test_wrong_settings_are_named():
    with pytest.raises(JaxmoeError, match="best"):
        SVDSettings(setting="best")
