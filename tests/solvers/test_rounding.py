import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.store import Store
from jaxmoe.solvers.half_quadratic import hqq
from jaxmoe.solvers.rounding import SHARES, fit_scale, round_nearest


def errors(weight, found, store):
    return ((np.asarray(found.values(store), np.float64) - weight) ** 2).reshape(-1, max(store.group, 1)).sum(-1)


@pytest.mark.parametrize(
    ("zero", "bits", "scale", "codes", "error"),
    [
        ("none", 4, 0.133333, [13, 0, 10, 8], 0.00916667),
        ("none", 2, 0.666667, [3, 0, 2, 2], 0.20472222),
        ("integer", 4, 0.113333, [15, 0, 12, 9], 0.0049),
        ("integer", 2, 0.566667, [3, 0, 3, 2], None),
    ],
)
def test_the_published_grids_of_four_numbers(zero, bits, scale, codes, error):
    numbers = np.array([[[0.7, -1.0, 0.3, 0.05]]])
    store = Store(bits=bits, group=4, zero=zero, scale="float32")
    found = round_nearest(numbers, store)
    assert found.scale is not None
    assert found.scale.item() == pytest.approx(scale, rel=1e-5)
    # -1 lies in the middle of two codes of the first grid, as far from each.
    assert np.abs(np.asarray(found.codes)[0, 0] - codes).max() <= (zero == "none" and bits == 4)
    if error is not None:
        assert errors(numbers, found, store).item() == pytest.approx(error, rel=1e-5)


def nearest(weight, bits, group, zero, importance=None):
    """Round to nearest in float64, scales in bfloat16; with a search where there is an importance."""
    top, blocks = 2**bits - 1, weight.reshape(*weight.shape[:2], -1, group)
    best, values = np.full(blocks.shape[:3], np.inf), np.zeros_like(blocks)
    for share in (1.0,) if importance is None else np.linspace(1, 0.5, 26):
        low, high = share * np.minimum(blocks.min(-1), 0), share * np.maximum(blocks.max(-1), 0)
        scale = (high - low) / top if zero == "integer" else share * np.abs(blocks).max(-1) / (top / 2)
        scale = scale.astype(np.float32).astype(bfloat16).astype(np.float64)
        middle = np.clip(np.round(-low / scale), 0, top) if zero == "integer" else np.full(scale.shape, (top + 1) / 2)
        codes = np.clip(np.round(blocks / scale[..., None] + middle[..., None]), 0, top)
        tried = scale[..., None] * (codes - middle[..., None])
        weights = 1.0 if importance is None else importance.reshape(-1, 1, *blocks.shape[2:])
        error = (weights * (tried - blocks) ** 2).sum(-1)
        values = np.where((error < best)[..., None], tried, values)
        best = np.minimum(error, best)
    return values.reshape(weight.shape)


@pytest.mark.parametrize("zero", ["none", "integer"])
@pytest.mark.parametrize("searched", [False, True])
def test_agrees_with_float64(zero, searched):
    rng = np.random.default_rng(0)
    weight, importance = rng.standard_normal((3, 4, 32)), rng.random((3, 32))
    store = Store(bits=3, group=16, zero=zero)
    found = round_nearest(weight, store, search=searched, importance=importance)
    expected = nearest(weight, 3, 16, zero, importance if searched else None)
    np.testing.assert_allclose(found.values(store), expected, rtol=1e-6, atol=1e-6)


def test_the_search_is_never_worse_than_the_whole_span():
    rng = np.random.default_rng(1)
    weight, matters = rng.standard_t(3, (3, 16, 32)), rng.random((3, 16, 32))
    store = Store(bits=2, group=16)
    plain, searched = (
        np.asarray(round_nearest(weight, store, search=search, importance=matters).values(store), np.float64)
        for search in (False, True)
    )
    before, after = ((matters * (values - weight) ** 2).reshape(-1, 16).sum(-1) for values in (plain, searched))
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize(
    "store",
    [
        Store(bits=4, group=8, zero="none"),
        Store(bits=2, group=8),
        Store(bits=3, group=8, zero="real"),
        Store(bits=3, group=0, scale="float16"),
        Store(bits=4, group=8, zero="none", table="normal_float"),
        Store(bits=4, group=8, zero="none", table="mxfp4"),
    ],
)
def test_constant_groups_are_exact_and_rounding_again_changes_nothing(store):
    constants = np.array([0.0, 0.3125, -2.0, 1e-30])
    weight = np.repeat(constants, 8)[None, :, None] * np.ones((1, 1, 16))
    if store.scale == "float16":
        weight = weight[:, :24]
    found = round_nearest(weight, store)
    np.testing.assert_allclose(found.values(store), weight, rtol=2e-3 if store.scale == "float16" else 4e-3, atol=0)
    np.testing.assert_array_equal(found.values(store)[:, :24], weight[:, :24])
    random = np.random.default_rng(2).standard_normal((1, 4, 16))
    once = round_nearest(random, store)
    grid = once.values(store)
    assert np.isfinite(grid).all()
    scale = np.repeat(np.asarray(once.scale), 16 // once.scale.shape[2], 2)
    # Half a step of codes, or of the widest gap of a codebook.
    assert (np.abs(grid - random) <= scale * (1.01 if store.table == "mxfp4" else 0.6)).all()


def test_scales_are_what_the_file_holds():
    weight = np.random.default_rng(3).standard_normal((1, 64, 32))
    for scale, dtype in (("bfloat16", bfloat16), ("float16", np.float16)):
        found = np.asarray(fit_scale(weight, Store(bits=4, scale=scale))[0])
        np.testing.assert_array_equal(found.astype(dtype).astype(np.float32), found)
    powers = np.log2(np.asarray(fit_scale(weight, Store(bits=4, zero="none", table="mxfp4", scale="exponent"))[0]))
    np.testing.assert_array_equal(powers, np.round(powers))
    # No number lies beyond the largest of a codebook then.
    assert (np.abs(weight).max(-1) <= 6 * 2**powers).all()


WORKED = np.array([[[-1, -0.2, 0.1, 0.15, 0.3, 0.35, 0.9, 2]]])
WORKED_STORE = Store(bits=2, group=8, zero="real", scale="float32")


# Compiled in a hurry, other last bits let the released rule stop a round later.
@pytest.mark.slow
def test_hqq_follows_the_released_code():
    released = hqq(WORKED, WORKED_STORE, released=True)
    assert released.zero is not None
    assert released.zero.item() == pytest.approx(0.94575888, abs=1e-6)


def test_hqq_keeps_the_zero_of_least_error_and_is_never_worse_than_its_start():
    ours = hqq(WORKED, WORKED_STORE)
    assert ours.zero is not None
    assert ours.zero.item() == pytest.approx(0.94208343, abs=1e-6)
    assert errors(WORKED, ours, WORKED_STORE).item() == pytest.approx(0.25233475, abs=1e-6)

    many, store = np.random.default_rng(4).standard_t(3, (2, 8, 64)), Store(bits=3, group=16, zero="real")
    start, after = (errors(many, found, store) for found in (round_nearest(many, store), hqq(many, store)))
    assert (after <= start * (1 + 1e-6)).all()
    assert after.sum() < 0.95 * start.sum()


def test_blocks_of_experts_and_a_jitted_call_find_the_same(monkeypatch):
    weight = np.random.default_rng(5).standard_normal((5, 4, 32)).astype(np.float32)
    store = Store(bits=4, group=16)
    whole = round_nearest(weight, store)
    jitted = jax.jit(lambda weight: round_nearest(weight, store))(weight)
    monkeypatch.setattr("jaxmoe.solvers.rounding.BLOCK", 2 * 4 * 32)
    for found in (round_nearest(weight, store), jitted):
        for one, other in zip(whole, found, strict=True):
            if one is not None:
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("weight", "store", "named"),
    [
        (np.full((1, 2, 16), np.nan), Store(bits=4, group=16), "NaN"),
        (np.ones((1, 2, 24)), Store(bits=4, group=16), "do not divide"),
        (np.ones((1, 2, 16)), Store(bits=4, group=0, zero="none", table="row"), "learned"),
    ],
)
def test_what_cannot_be_rounded_is_refused(weight, store, named):
    with pytest.raises(JaxmoeError, match=named):
        round_nearest(weight, store)


def test_other_refusals():
    weight = jnp.ones((2, 2, 16))
    with pytest.raises(JaxmoeError, match="importance"):
        round_nearest(weight, Store(bits=4, group=16), search=True, importance=jnp.ones((3, 16)))
    with pytest.raises(JaxmoeError, match="real zeros"):
        hqq(weight, Store(bits=4, group=16))
    assert len(SHARES) == 26
