"""Scores against numpy in float64, their invariants, and what they are at the edges; jit and vmap change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe import scores

RNG = np.random.default_rng(0)
E, F, D = 5, 6, 8
COUNTS = np.array([40, 7, 0, 1, 12])
MATRICES = RNG.standard_t(3, size=(E, F, D))


def entropy_rank(singular_values):
    energies = singular_values**2
    q = energies[energies > 0] / energies.sum()
    return np.exp(-np.sum(q * np.log(q)))


def test_effective_rank_of_matrices():
    values = np.linalg.svd(MATRICES, compute_uv=False)
    expected = [entropy_rank(each) for each in values]
    np.testing.assert_allclose(scores.effective_rank(jnp.asarray(values**2)), expected, rtol=1e-5)
    grams = np.linalg.eigvalsh(MATRICES @ MATRICES.transpose(0, 2, 1))
    np.testing.assert_allclose(scores.effective_rank(jnp.asarray(grams)), expected, rtol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(4, 9), (9, 4), (5, 5)])
def test_effective_rank_of_orthogonal_rows_is_the_side_and_of_rank_one_is_one(rows, columns):
    orthogonal = np.linalg.qr(RNG.normal(size=(max(rows, columns), min(rows, columns))))[0]
    side = scores.effective_rank(jnp.asarray(np.linalg.svd(orthogonal, compute_uv=False) ** 2))
    assert float(side) == pytest.approx(min(rows, columns), rel=1e-5)
    single = np.outer(RNG.normal(size=rows), RNG.normal(size=columns))
    one = scores.effective_rank(jnp.asarray(np.linalg.svd(single, compute_uv=False) ** 2))
    assert float(one) == pytest.approx(1, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=7, max_size=7), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_effective_rank_lies_between_one_and_the_number_of_values_in_any_units(values, unit):
    energies = np.float32(values)
    found = float(scores.effective_rank(jnp.asarray(energies)))
    assert 1 - 1e-5 <= found <= 7 + 1e-4
    shuffled = jnp.asarray((energies * np.float32(unit))[::-1])
    if energies[energies > 0].size == 0 or (energies[energies > 0] * unit).min() > 1e-37:
        assert float(scores.effective_rank(shuffled)) == pytest.approx(found, rel=1e-4)


def test_effective_rank_of_zeros_is_one_and_noise_below_zero_does_not_count():
    found = scores.effective_rank(jnp.array([[0.0, 0.0, 0.0], [4.0, 4.0, -1e-7]]))
    np.testing.assert_allclose(found, [1.0, 2.0], rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=20))
def test_frequency_is_a_share_of_choices_and_uniform_without_any(counts):
    counts = np.array(counts)
    expected = counts / counts.sum() if counts.sum() else np.full(len(counts), 1 / len(counts))
    found = scores.routing_frequency(counts)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert float(found.sum()) == pytest.approx(1, rel=1e-5)


def test_sums_neither_overflow_nor_vanish():
    np.testing.assert_allclose(scores.normalized(jnp.full(8, 5e37)), 0.125)
    np.testing.assert_allclose(scores.normalized(jnp.full(4, 2e-38)), 0.25)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 99), st.floats(0, 1))
def test_fused_importance_is_the_line_between_information_and_frequency(seed, xi):
    rng = np.random.default_rng(seed)
    information, counts = rng.uniform(1, 500, size=9), rng.integers(0, 9, size=9) + (np.arange(9) == 4)
    expected = xi * information / information.sum() + (1 - xi) * counts / counts.sum()
    found = scores.fused_importance(jnp.asarray(information), counts, xi)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert float(found.sum()) == pytest.approx(1, rel=1e-5)


def test_fused_importance_at_both_ends():
    information = jnp.array([1.0, 2.0, 5.0])
    for counts in ([9, 0, 1], [0, 3, 3]):
        np.testing.assert_array_equal(
            scores.fused_importance(information, np.array(counts), 1.0), scores.normalized(information)
        )
        np.testing.assert_allclose(
            scores.fused_importance(information, np.array(counts), 0.0), np.array(counts) / sum(counts), rtol=1e-6
        )
    np.testing.assert_allclose(scores.fused_importance(jnp.zeros(2), np.zeros(2, int), 0.3), 0.5)


def test_fisher_mass_is_the_sum_over_a_matrix():
    fisher = MATRICES**2
    fisher[2] = 0
    found = scores.fisher_mass(jnp.asarray(fisher))
    np.testing.assert_allclose(found, [each.sum() for each in fisher], rtol=1e-5)
    assert found[2] == 0


def test_norms_are_means_over_the_tokens_of_an_expert():
    outputs = [RNG.normal(size=(count, D)) for count in COUNTS]
    weights = [RNG.uniform(size=count) for count in COUNTS]
    norms = [np.linalg.norm(each, axis=1) for each in outputs]
    sums = np.array([each.sum() for each in norms])
    weighted = np.array([(w * n).sum() for w, n in zip(weights, norms, strict=True)])
    expected = [each.mean() if each.size else 0.0 for each in norms]
    np.testing.assert_allclose(scores.output_norm(sums, COUNTS), expected, rtol=1e-5)
    expected = [(w * n).mean() if n.size else 0.0 for w, n in zip(weights, norms, strict=True)]
    np.testing.assert_allclose(scores.router_weighted_output_norm(weighted, COUNTS), expected, rtol=1e-5)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_channel_energy_follows_the_tokens(rho):
    down = RNG.normal(size=(E, D, F))
    down[1, :, 3] = 0
    activations = [RNG.normal(size=(count, F)) for count in COUNTS]
    expected = np.zeros((E, F))
    for expert in range(E):
        for channel in range(F):
            squares = activations[expert][:, channel] ** 2
            peak = squares.max() if squares.size else 0.0
            size = np.sum(down[expert, :, channel] ** 2)
            expected[expert, channel] = size * ((1 - rho) * squares.sum() + rho * peak)
    energies = np.array([(each**2).sum(0) for each in activations])
    peaks = np.array([(each**2).max(0, initial=0) for each in activations])
    found = scores.channel_energy(jnp.asarray(down), energies, peaks, rho)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not found[2].any()
    assert found[1, 3] == 0
    if rho == 0:
        # The energy is the squared norm of what the channel adds over all tokens.
        outputs = np.einsum("tf,df->tfd", activations[0], down[0])
        np.testing.assert_allclose(found[0], (outputs**2).sum((0, 2)), rtol=1e-5)


def test_kurtosis_of_known_distributions():
    weights = np.stack([RNG.normal(size=(600, 500)), RNG.uniform(-1, 1, size=(600, 500)), RNG.laplace(size=(600, 500))])
    found = scores.kurtosis(
        jnp.asarray(weights * np.array([1e-12, 1e12, 1.0])[:, None, None] + [[[0]], [[0]], [[0.1]]])
    )
    np.testing.assert_allclose(found, [0, -1.2, 3], atol=0.15)
    centred = weights - weights.mean((1, 2), keepdims=True)
    expected = (centred**4).mean((1, 2)) / (centred**2).mean((1, 2)) ** 2 - 3
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e-7])
def test_kurtosis_of_equal_entries_is_zero(value):
    assert float(scores.kurtosis(jnp.full((37, 11), value))) == 0


def outliers(weight):
    columns = [abs(column) for column in weight.T if column.any()]
    return max((column.max() / column.mean() for column in columns), default=1.0)


def test_outlier_score_of_columns():
    weights = RNG.standard_t(2, size=(E, F, D))
    weights[0, :, 2] = 0
    weights[1] = 0
    weights[2] = 0.25
    found = scores.outlier_score(jnp.asarray(weights))
    np.testing.assert_allclose(found, [outliers(each) for each in weights], rtol=1e-5)
    assert found[1] == found[2] == 1
    assert float(scores.outlier_score(jnp.eye(F))) == pytest.approx(F)
    scales = jnp.asarray(RNG.uniform(1e-3, 1e3, size=D))
    np.testing.assert_allclose(scores.outlier_score(jnp.asarray(weights) * scales), found, rtol=1e-5)


LAYERS = 3
CASES = {
    "normalized": (RNG.uniform(size=(LAYERS, E)),),
    "routing_frequency": (RNG.integers(0, 3, size=(LAYERS, E)),),
    "effective_rank": (RNG.uniform(size=(LAYERS, E, F)) * RNG.integers(0, 2, size=(LAYERS, E, 1)),),
    "fused_importance": (RNG.uniform(size=(LAYERS, E)), RNG.integers(0, 3, size=(LAYERS, E)), 0.7),
    "fisher_mass": (RNG.uniform(size=(LAYERS, E, F, D)),),
    "output_norm": (RNG.uniform(size=(LAYERS, E)), RNG.integers(0, 3, size=(LAYERS, E))),
    "router_weighted_output_norm": (RNG.uniform(size=(LAYERS, E)), RNG.integers(0, 3, size=(LAYERS, E))),
    "channel_energy": (*(RNG.uniform(size=(LAYERS, E, *s)) for s in ((D, F), (F,), (F,))), 0.5),
    "kurtosis": (RNG.normal(size=(LAYERS, E, F, D)),),
    "outlier_score": (RNG.normal(size=(LAYERS, E, F, D)),),
}


@pytest.mark.parametrize("name", CASES)
def test_leading_axes_vmap_jit_and_gradients(name):
    function, arguments = getattr(scores, name), CASES[name]
    arrays = [jnp.asarray(each) for each in arguments if isinstance(each, np.ndarray)]
    bound = functools.partial(lambda *given, rest: function(*given, *rest), rest=arguments[len(arrays) :])
    whole = bound(*arrays)
    jitted = jax.jit(bound)
    each = np.stack([jitted(*(array[layer] for array in arrays)) for layer in range(LAYERS)])
    np.testing.assert_allclose(whole, each, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(bound))(*arrays), each, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jitted(*arrays), whole, rtol=1e-5, atol=1e-5)
    if jnp.issubdtype(arrays[0].dtype, jnp.floating):
        # The guards of divisions and logarithms hold for gradients too.
        gradient = jax.grad(lambda first: bound(first, *arrays[1:]).sum())(arrays[0] * (arrays[0] > 0.3))
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_widened(name):
    arguments = [jnp.asarray(x, jnp.bfloat16) if isinstance(x, np.ndarray) else x for x in CASES[name]]
    assert getattr(scores, name)(*arguments).dtype == jnp.float32
    with jax.enable_x64(True):
        assert getattr(scores, name)(*CASES[name]).dtype == jnp.float64
