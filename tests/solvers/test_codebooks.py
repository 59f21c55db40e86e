"""Weighted k-means in one dimension against every way to cut, its invariants, and tables over rows and matrices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.store import Store
from jaxmoe.solvers import codebooks
from jaxmoe.solvers.codebooks import codebook, learned_tables, nearest_codes

TOY = [0, 0.1, 0.2, 1, 1.1, 5]
ROW = Store(bits=3, group=0, zero="none", table="row")
MATRIX = Store(bits=3, group=16, zero="none", table="matrix")


solved = jax.jit(codebook, static_argnames="codes")


def found(values, weights, codes):
    with jax.enable_x64(True):
        rows = (np.atleast_2d(np.asarray(x, np.float64)) for x in (values, weights))
        return np.asarray(solved(*rows, codes=codes))


def loss(values, weights, table):
    return np.sum(weights * np.min((np.asarray(values)[..., None] - np.asarray(table)[..., None, :]) ** 2, -1), -1)


def least(values, weights, codes):
    """Return the least loss over all ways to cut a sorted row."""
    order = np.argsort(values)
    x, v, n = np.asarray(values)[order], np.asarray(weights)[order], len(values)
    best = np.inf
    for inner in itertools.combinations_with_replacement(range(n + 1), codes - 1):
        total = 0.0
        for begin, end in itertools.pairwise((0, *inner, n)):
            own, say = x[begin:end], v[begin:end]
            if say.sum() > 0:
                total += np.sum(say * (own - np.average(own, weights=say)) ** 2)
        best = min(best, total)
    return best


@pytest.mark.parametrize(
    ("codes", "weights", "table", "expected"),
    [
        (2, [1, 1, 1, 1, 1, 1], [0.48, 5], 1.108),
        (2, [1, 1, 1, 1, 1, 0], [0.1, 1.05], 0.025),
        (2, [10, 1, 1, 1, 1, 1], [0.17142857, 5], 1.84857143),
        (4, [1, 1, 1, 1, 1, 1], [0, 0.15, 1.05, 5], 0.01),
    ],
)
def test_known_solutions(codes, weights, table, expected):
    (own,) = found(TOY, weights, codes)
    np.testing.assert_allclose(own, table, atol=1e-8)
    assert loss(TOY, weights, own) == pytest.approx(expected)


def test_numbers_without_weight_cost_nothing():
    weights = [1, 1, 1, 1, 1, 0]
    assert loss(TOY, weights, found(TOY, weights, 4)[0]) == pytest.approx(0.005)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([(1, 3), (3, 4), (12, 3), (12, 4)]), st.integers(0, 10**6))
def test_equals_the_best_of_all_cuts(sizes, seed):
    """Ties, weights of zero, and fewer numbers than codes among them."""
    n, codes = sizes
    rng = np.random.default_rng(seed)
    values = rng.integers(-4, 5, (3, n)) * 0.3 + rng.integers(0, 2) * rng.normal(size=(3, n))
    weights = rng.exponential(size=(3, n)) * rng.integers(0, 2, (3, n))
    tables = found(values, weights, codes)
    assert (np.diff(tables) >= 0).all()
    counted = np.where(weights.any(1, keepdims=True), weights, 1)
    optimum = [least(x, v, codes) for x, v in zip(values, counted)]
    np.testing.assert_allclose(loss(values, counted, tables), optimum, atol=1e-12)


@pytest.mark.parametrize(("codes", "excess"), [(8, 2e-3), (16, 1e-2)])
def test_bins_of_longer_rows_come_close(codes, excess, monkeypatch):
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(4, 600)), rng.exponential(size=(4, 600))
    binned = loss(values, weights, found(values, weights, codes))
    monkeypatch.setattr(codebooks, "BINS", 600)
    with jax.enable_x64(True):
        exact = loss(values, weights, codebook(values, weights, codes=codes))
    assert (exact <= binned * (1 + 1e-9)).all()
    assert (binned <= exact * (1 + excess)).all()


def test_gathering_stands_for_sorting(monkeypatch):
    rng = np.random.default_rng(1)
    values, weights = rng.normal(size=(1, 3000)), rng.exponential(size=(1, 3000))
    sorted_ = loss(values, weights, found(values, weights, 8))
    monkeypatch.setattr(codebooks, "CELLS", 1024)
    with jax.enable_x64(True):
        assert loss(values, weights, codebook(values, weights, codes=8)) == pytest.approx(sorted_, rel=2e-3)
        np.testing.assert_allclose(codebook(np.full((1, 3000), 2.5), weights, codes=4), 2.5)


def test_more_codes_never_lose_more_and_scales_carry_over():
    rng = np.random.default_rng(2)
    values, weights = rng.normal(size=(5, 40)), rng.exponential(size=(5, 40))
    losses = [loss(values, weights, found(values, weights, codes)) for codes in (1, 2, 4, 8)]
    for fewer, more in itertools.pairwise(losses):
        assert (more <= fewer).all()
    table = found(values, weights, 4)
    np.testing.assert_allclose(found(3 * values, weights, 4), 3 * table)
    np.testing.assert_allclose(found(values, 7 * weights, 4), table)


def test_nearest_codes_are_the_nearest():
    rng = np.random.default_rng(3)
    values, table = rng.normal(size=(4, 50)).astype(np.float32), np.sort(rng.normal(size=(4, 8)).astype(np.float32))
    codes = np.asarray(nearest_codes(jnp.asarray(values), jnp.asarray(table)))
    own = np.take_along_axis(table, codes.astype(int), 1)
    np.testing.assert_allclose(abs(values - own), np.abs(values[..., None] - table[:, None]).min(-1))


@pytest.mark.parametrize("store", [ROW, MATRIX])
def test_tables_are_as_files_hold_them(store):
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(3, 8, 32)).astype(np.float32)
    rounded = learned_tables(weight, store, importance=rng.exponential(size=(3, 32)))
    for array in (rounded.scale, rounded.table):
        if array is not None:
            np.testing.assert_array_equal(array.astype(jnp.bfloat16).astype(jnp.float32), array)
    assert rounded.table.shape == ((24, 8) if store.table == "row" else (3, 8))
    error = np.linalg.norm(rounded.values(store) - weight) / np.linalg.norm(weight)
    assert error < 0.25
    # The codes are the nearest to the table as it is stored.
    levels = weight if rounded.scale is None else weight / np.repeat(rounded.scale, 16, axis=2)
    rows = levels.reshape(len(rounded.table), -1)
    nearest = np.abs(rows[..., None] - np.asarray(rounded.table)[:, None]).min(-1)
    own = np.abs(
        rows - np.take_along_axis(np.asarray(rounded.table), np.asarray(rounded.codes, int).reshape(rows.shape), 1)
    )
    np.testing.assert_allclose(own, nearest, atol=1e-6)


@pytest.mark.parametrize("store", [ROW, MATRIX])
def test_importance_is_served(store):
    """Weights on some columns lower their error at the others' cost; experts do not see each other."""
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(2, 8, 32))
    importance = np.where(np.arange(32) < 8, 100.0, 1.0)[None]

    def squares(rounded, columns):
        return np.sum((np.asarray(rounded.values(store)) - weight)[..., columns] ** 2)

    plain, aware = learned_tables(weight, store), learned_tables(weight, store, importance=importance)
    assert squares(aware, slice(8)) < 0.9 * squares(plain, slice(8))
    assert squares(aware, slice(8, None)) > squares(plain, slice(8, None))
    alone = learned_tables(weight[1:], store, importance=np.broadcast_to(importance[:, None], (1, 8, 32)))
    np.testing.assert_array_equal(alone.codes[0], aware.codes[1])


def test_edges():
    zeros = learned_tables(np.zeros((1, 4, 32)), MATRIX)
    assert not np.asarray(zeros.values(MATRIX)).any()
    constant = learned_tables(np.full((1, 4, 32), -0.75), ROW)
    np.testing.assert_array_equal(constant.values(ROW), -0.75)
    with pytest.raises(JaxmoeError, match="not learned"):
        learned_tables(np.zeros((1, 4, 32)), Store(bits=4))
    with pytest.raises(JaxmoeError, match="do not divide"):
        learned_tables(np.zeros((1, 4, 24)), MATRIX)
    with pytest.raises(JaxmoeError, match="NaN"):
        learned_tables(np.full((1, 4, 32), np.nan), ROW)
    with pytest.raises(JaxmoeError, match="importance"):
        learned_tables(np.zeros((2, 4, 32)), ROW, importance=np.ones((2, 4)))
    with pytest.raises(JaxmoeError, match="at least 1"):
        codebook(jnp.ones((1, 3)), jnp.ones((1, 3)), codes=0)
