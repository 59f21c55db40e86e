"""Merged bases against numpy in float64, what they minimise, and what they are at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import unchecked

from jaxmoe.errors import JaxmoeError
from jaxmoe.solvers.merging import merge, regmean, shared_energy, ties

E, OUT, IN = 5, 4, 6
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(E, OUT, IN)).astype(np.float32)
FISHER = (RNG.normal(size=(E, OUT, IN)) ** 2).astype(np.float32)
COUNTS = np.array([30, 0, 5, 1, 200])
METHODS = ("fisher", "fisher_freq", "freq", "mean")


def shares(method, fisher=FISHER, counts=COUNTS):
    ones = np.ones((E, OUT, IN))
    freq = counts[:, None, None] * ones
    return {"fisher": fisher * ones, "fisher_freq": fisher * freq, "freq": freq, "mean": ones}[method]


def average(weight, say):
    return (say * weight).sum(0, dtype=np.float64) / say.sum(0, dtype=np.float64)


@pytest.mark.parametrize("method", METHODS)
def test_is_the_average_by_its_shares(method):
    found = merge(WEIGHT, method=method, fisher=FISHER, counts=COUNTS)
    np.testing.assert_allclose(found, average(WEIGHT, shares(method)), rtol=1e-5, atol=1e-6)


def test_equal_information_is_the_mean_and_with_counts_the_average_by_frequency():
    ones = np.ones_like(FISHER)
    np.testing.assert_allclose(merge(WEIGHT, fisher=ones), WEIGHT.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        merge(WEIGHT, method="fisher_freq", fisher=ones, counts=COUNTS),
        merge(WEIGHT, method="freq", counts=COUNTS),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("expert", range(E))
def test_information_of_one_expert_gives_that_expert(expert):
    only = np.zeros_like(FISHER)
    only[expert] = FISHER[expert]
    np.testing.assert_allclose(merge(WEIGHT, fisher=only), WEIGHT[expert], rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-12, 1e12), st.integers(1, 1000))
def test_units_of_information_and_counts_do_not_matter(unit, times):
    for method in METHODS:
        np.testing.assert_allclose(
            merge(WEIGHT, method=method, fisher=unit * FISHER, counts=times * COUNTS),
            merge(WEIGHT, method=method, fisher=FISHER, counts=COUNTS),
            rtol=1e-4,
            atol=1e-5,
        )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.sampled_from(METHODS))
def test_minimises_the_weighted_squared_error(seed, method):
    say = shares(method)

    def loss(base):
        return (say * (WEIGHT.astype(np.float64) - base) ** 2).sum()

    base = np.asarray(merge(WEIGHT, method=method, fisher=FISHER, counts=COUNTS), np.float64)
    step = np.random.default_rng(seed).normal(size=base.shape)
    assert loss(base) < loss(base + 1e-2 * step)
    # Stationary: the loss is even around the base.
    assert loss(base + step) == pytest.approx(loss(base - step), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_equal_experts_leave_no_delta_to_the_last_bit(method):
    weight = np.repeat(WEIGHT[:1], E, 0)
    base = merge(weight, method=method, fisher=FISHER, counts=COUNTS)
    np.testing.assert_array_equal(base, weight[0])
    np.testing.assert_array_equal(ties(weight), weight[0])
    np.testing.assert_array_equal(regmean(weight, moments()), weight[0])


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(E)))
def test_the_order_of_experts_does_not_matter(order):
    order = np.array(order)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for method in METHODS:
        np.testing.assert_allclose(
            merge(WEIGHT[order], method=method, fisher=FISHER[order], counts=COUNTS[order]),
            merge(WEIGHT, method=method, fisher=FISHER, counts=COUNTS),
            **close,
        )
    np.testing.assert_allclose(ties(WEIGHT[order], density=0.3), ties(WEIGHT, density=0.3), **close)
    np.testing.assert_allclose(regmean(WEIGHT[order], moments()[order]), regmean(WEIGHT, moments()), **close)


def test_entries_without_information_fall_back_on_frequency_then_on_the_mean():
    fisher = FISHER.copy()
    fisher[:, 1, 2] = 0
    for method in ("fisher", "fisher_freq"):
        found = merge(WEIGHT, method=method, fisher=fisher, counts=COUNTS)
        assert found[1, 2] == pytest.approx(average(WEIGHT, shares("freq"))[1, 2], rel=1e-5)
        found = merge(WEIGHT, method=method, fisher=fisher, counts=0 * COUNTS)
        assert found[1, 2] == pytest.approx(WEIGHT[:, 1, 2].mean(), rel=1e-5)
        assert np.isfinite(found).all()
    assert merge(WEIGHT, fisher=fisher)[1, 2] == pytest.approx(WEIGHT[:, 1, 2].mean(), rel=1e-5)
    np.testing.assert_allclose(merge(WEIGHT, method="freq", counts=0 * COUNTS), WEIGHT.mean(0), rtol=1e-5, atol=1e-6)
    # Only an expert that no token chose has information here: the other weights decide, not 0 / 0.
    only = np.zeros_like(FISHER)
    only[1] = FISHER[1]
    np.testing.assert_allclose(
        merge(WEIGHT, method="fisher_freq", fisher=only, counts=COUNTS), average(WEIGHT, shares("freq")), rtol=1e-5
    )


def moments(tokens=(40, 9, 3, 25, 60)):
    return np.stack([x.T @ x for x in inputs(tokens)])


def inputs(tokens=(40, 9, 3, 25, 60)):
    rng = np.random.default_rng(3)
    return [rng.normal(size=(count, IN)) * np.geomspace(2, 0.2, IN) for count in tokens]


def test_regmean_is_least_squares_on_the_raw_inputs():
    rows = inputs()
    outputs = [x @ w.T for x, w in zip(rows, WEIGHT.astype(np.float64), strict=True)]
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(outputs), rcond=None)[0].T
    with jax.enable_x64(True):
        found = regmean(WEIGHT, moments(), ridge=0.0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        found = regmean(WEIGHT.astype(np.float64), moments(), ridge=0.0)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(regmean(WEIGHT, moments(), ridge=0.0), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_regmean_with_a_ridge_is_least_squares_with_as_many_more_inputs(ridge):
    """The ridge stands for inputs along every axis that every expert received."""
    level = np.trace(moments(), axis1=1, axis2=2).mean() / IN
    rows = [np.concatenate([x, np.sqrt(ridge * level) * np.eye(IN)]) for x in inputs()]
    outputs = [x @ w.T for x, w in zip(rows, WEIGHT.astype(np.float64), strict=True)]
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(outputs), rcond=None)[0].T
    np.testing.assert_allclose(regmean(WEIGHT, moments(), ridge=ridge), expected, rtol=1e-4, atol=1e-5)


def test_regmean_at_the_edges():
    alike = np.repeat(moments()[:1], E, 0)
    np.testing.assert_allclose(regmean(WEIGHT, alike), WEIGHT.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(regmean(WEIGHT, 0 * alike), WEIGHT.mean(0), rtol=1e-5, atol=1e-6)
    # One token in all: what it does not reach is averaged, along it its expert decides.
    single = np.zeros((E, IN, IN))
    axis = RNG.normal(size=IN)
    axis /= np.linalg.norm(axis)
    single[2] = np.outer(axis, axis)
    with jax.enable_x64(True):
        found = np.asarray(regmean(WEIGHT.astype(np.float64), single, ridge=1e-4))
    np.testing.assert_allclose(found @ axis, WEIGHT[2] @ axis, atol=2e-3)
    other = np.eye(IN) - np.outer(axis, axis)
    np.testing.assert_allclose(found @ other, WEIGHT.mean(0) @ other, atol=1e-5)


def votes(weight, density, scale):
    weight = weight.astype(np.float64)
    mean = weight.mean(0)
    kept = max(1, round(density * weight[0].size))
    trimmed = np.zeros_like(weight)
    for expert, delta in enumerate(weight - mean):
        for place in np.argsort(-abs(delta), axis=None)[:kept]:
            trimmed[expert].flat[place] = delta.flat[place]
    base = mean.copy()
    for place in np.ndindex(mean.shape):
        own = trimmed[(slice(None), *place)]
        if own.all():
            continue  # untrimmed, deviations from the mean sum to zero
        sign = np.sign(own.sum())
        agree = own[own * sign > 0]
        if agree.size:
            base[place] += scale * agree.mean()
    return base


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_ties_is_the_published_vote(density, scale):
    np.testing.assert_allclose(
        ties(WEIGHT, density=density, scale=scale), votes(WEIGHT, density, scale), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_ties_of_whole_deviations_is_the_mean(offset):
    np.testing.assert_allclose(ties(WEIGHT + offset, density=1.0), (WEIGHT + offset).mean(0), rtol=1e-6, atol=1e-7)


def roots(moments):
    values, vectors = np.linalg.eigh(moments)
    return vectors * np.sqrt(np.maximum(values, 0))[..., None, :]


@pytest.mark.parametrize("kind", ["none", "one", "each"])
def test_shared_energy_in_numpy(kind):
    weight = WEIGHT.astype(np.float64) + 2 * RNG.normal(size=(OUT, IN))
    base = weight.mean(0)
    second = {"none": None, "one": moments().sum(0, keepdims=True), "each": moments()}[kind]
    root = np.eye(IN)[None] if second is None else roots(second)
    expected = 1 - np.sum(((weight - base) @ root) ** 2) / np.sum((weight @ root) ** 2)
    assert 0.2 < expected < 1
    for unit in (1e-20, 1.0, 1e25):
        scaled = None if second is None else unit * second
        assert float(shared_energy(weight, base, scaled)) == pytest.approx(expected, rel=1e-4)


def test_shared_energy_at_the_edges():
    equal = np.repeat(WEIGHT[:1], E, 0)
    assert float(shared_energy(equal, equal[0])) == 1
    assert float(shared_energy(WEIGHT, np.zeros((OUT, IN)))) == 0
    assert float(shared_energy(WEIGHT, -WEIGHT[0])) == 0
    assert float(shared_energy(0 * WEIGHT, WEIGHT[0])) == 0
    assert float(shared_energy(WEIGHT, WEIGHT[0], np.zeros((1, IN, IN)))) == 0


def test_unrelated_experts_share_one_part_in_their_number():
    weight = np.random.default_rng(1).normal(size=(8, 60, 80))
    assert float(shared_energy(weight, weight.mean(0))) == pytest.approx(1 / 8, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999))
def test_no_base_shares_more_than_regmean(seed):
    step = np.random.default_rng(seed).normal(size=(OUT, IN))
    weight = WEIGHT + np.float32(1.5)
    with jax.enable_x64(True):
        base = regmean(weight.astype(np.float64), moments(), ridge=0.0)
        most = float(shared_energy(weight, base, moments()))
        assert most > float(shared_energy(weight, base + 1e-2 * step, moments()))
        assert most > float(shared_energy(weight, weight.mean(0), moments()))


def test_jit_equals_eager_and_half_precision_is_widened():
    given_ = {"fisher": jnp.asarray(FISHER), "counts": jnp.asarray(COUNTS)}
    half = jnp.asarray(WEIGHT, jnp.bfloat16)
    for method in METHODS:
        jitted = jax.jit(merge, static_argnames="method")(WEIGHT, method=method, **given_)
        np.testing.assert_allclose(jitted, merge(WEIGHT, method=method, **given_), rtol=1e-5, atol=1e-6)
        assert merge(half, method=method, **given_).dtype == jnp.float32
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(jax.jit(regmean)(WEIGHT, moments()), regmean(WEIGHT, moments()), **close)
    np.testing.assert_allclose(jax.jit(ties)(WEIGHT), ties(WEIGHT), **close)
    np.testing.assert_allclose(jax.jit(shared_energy)(WEIGHT, WEIGHT[0]), shared_energy(WEIGHT, WEIGHT[0]), **close)
    assert regmean(half, moments()).dtype == ties(half).dtype == shared_energy(half, half[0]).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge(WEIGHT, method="median"), "unknown merge 'median': give one of fisher, fisher_freq, freq, mean"),
        (lambda: merge(WEIGHT), "fisher needs the Fisher information"),
        (lambda: merge(WEIGHT, method="fisher_freq"), "Fisher information.*; fisher_freq needs counts"),
        (lambda: merge(WEIGHT, fisher=FISHER[1:]), r"fisher \(4, 4, 6\): give \[5, 4, 6\]"),
        (lambda: merge(WEIGHT, method="freq", counts=COUNTS[1:]), r"counts \(4,\): give \[5\]"),
        (lambda: regmean(WEIGHT, moments()[:1]), r"give one for each expert, \[5, 6, 6\]"),
        (lambda: ties(WEIGHT, density=0.0), "density 0.0"),
        (lambda: shared_energy(WEIGHT, WEIGHT), r"base \(5, 4, 6\)"),
        (lambda: shared_energy(WEIGHT, WEIGHT[0], moments()[:2]), "moments has shape"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with unchecked(), pytest.raises(JaxmoeError, match=message):
        call()
