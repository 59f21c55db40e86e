import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.quantised import QuantisedArray
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.solvers.error_feedback import error_feedback, factored
from jaxmoe.solvers.rounding import round_nearest

GROUP = 16


def problem(seed, experts, out, in_):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((experts, in_, in_)) * np.logspace(0, 1.5, in_)
    return rng.standard_normal((experts, out, in_)), inputs @ inputs.swapaxes(1, 2) / in_


def losses(weight, values, moment):
    rest = np.asarray(values, np.float64) - weight
    return np.einsum("eoi,eij,eoj->eo", rest, moment, rest)


def scales(x, weights, bits, zero):
    """Search the scales of rows `[out, group]` in float64."""
    top, best = 2**bits - 1, np.full(len(x), np.inf)
    scale, middle = np.zeros(len(x)), np.zeros(len(x))
    for share in np.linspace(1, 0.5, 26):
        low, high = share * np.minimum(x.min(1), 0), share * np.maximum(x.max(1), 0)
        s = (high - low) / top if zero == "integer" else share * np.abs(x).max(1) / (top / 2)
        s = s.astype(np.float32).astype(bfloat16).astype(np.float64)
        z = np.clip(np.round(-low / s), 0, top) if zero == "integer" else np.full(len(x), (top + 1) / 2)
        q = np.clip(np.round(x / s[:, None] + z[:, None]), 0, top)
        error = (weights * (s[:, None] * (q - z[:, None]) - x) ** 2).sum(1)
        scale, middle = np.where(error < best, s, scale), np.where(error < best, z, middle)
        best = np.minimum(error, best)
    return scale, middle


def gptq(weight, moment, bits, zero, order):
    """GPTQ as published, with the factor of the inverse, for one matrix in float64."""
    columns = weight.shape[1]
    damped = moment + 0.01 * np.mean(np.diag(moment)) * np.eye(columns)
    diagonal = np.diag(damped)
    permutation = np.argsort(-diagonal, kind="stable") if order else np.arange(columns)
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(permutation, permutation)])).T
    groups = [slice(start, start + GROUP) for start in range(0, columns, GROUP)]
    found = [scales(weight[:, own], diagonal[own], bits, zero) for own in groups]
    work, values = weight[:, permutation].copy(), np.zeros_like(weight)
    for place, column in enumerate(permutation):
        if not order and place % GROUP == 0:
            own = groups[place // GROUP]
            found[place // GROUP] = scales(work[:, own], diagonal[own], bits, zero)
        scale, middle = found[column // GROUP]
        codes = np.clip(np.round(work[:, place] / scale + middle), 0, 2**bits - 1)
        values[:, column] = scale * (codes - middle)
        error = (work[:, place] - values[:, column]) / upper[place, place]
        work[:, place:] -= np.outer(error, upper[place, place:])
    return values


@pytest.mark.parametrize(("zero", "order"), [("none", True), ("integer", True), ("integer", False)])
def test_agrees_with_the_published_algorithm_in_float64(zero, order):
    weight, moment = problem(0, experts=2, out=6, in_=48)
    store = Store(bits=3, group=GROUP, zero=zero)
    found = error_feedback(weight, store, moment=moment, order=order).values(store)
    expected = np.stack([gptq(*own, 3, zero, order) for own in zip(weight, moment)])
    # Every row of these is better than plain rounding, so that none is replaced.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_three_numbers_by_hand():
    moment = np.array([[[1, 0.9, 0.5], [0.9, 1, 0.6], [0.5, 0.6, 1]]])
    factor = factored(moment, damping=0)
    np.testing.assert_allclose(1 / factor.diagonal, [[2.30940108, 1.25, 1]], rtol=1e-6)
    weight, store = np.full((1, 1, 3), 0.4), Store(bits=2, group=0, zero="none")
    ones = Rounded(np.zeros((1, 1, 3), np.uint8), np.ones((1, 1, 1)))
    values = error_feedback(weight, store, moment=moment, damping=0, given=ones).values(store)
    np.testing.assert_array_equal(values, [[[0, 1, 0]]])
    assert losses(weight, values, moment).item() == pytest.approx(0.12)
    assert losses(weight, np.zeros((1, 1, 3)), moment).item() == pytest.approx(1.12)


def test_never_worse_than_rounding_in_a_thousand_cases():
    weight, moment = problem(1, experts=1000, out=2, in_=32)
    store = Store(bits=2, group=GROUP)
    plain = round_nearest(weight, store)
    for order in (False, True):
        found = error_feedback(weight, store, moment=moment, order=order, search=False)
        before, after = (losses(weight, own.values(store), moment) for own in (plain, found))
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < 0.7 * before.sum()


def test_without_correlations_it_is_plain_rounding():
    weight, _ = problem(2, experts=2, out=6, in_=48)
    store = Store(bits=3, group=GROUP, zero="none")
    plain = round_nearest(weight, store)
    for order in (False, True):
        found = error_feedback(weight, store, moment=2 * np.eye(48)[None], order=order, search=False)
        np.testing.assert_array_equal(found.codes, plain.codes)
        np.testing.assert_array_equal(found.scale, plain.scale)


def test_experts_do_not_depend_on_each_other(monkeypatch):
    weight, moment = problem(3, experts=2, out=6, in_=48)
    store = Store(bits=3, group=GROUP)
    whole = error_feedback(weight, store, moment=moment, search=False)
    shared = error_feedback(weight, store, moment=moment[:1], search=False)
    np.testing.assert_array_equal(shared.codes[:1], whole.codes[:1])
    monkeypatch.setattr("jaxmoe.solvers.rounding.BLOCK", 1)
    one_by_one = error_feedback(weight, store, moment=moment, search=False)
    np.testing.assert_array_equal(one_by_one.codes, whole.codes)
    np.testing.assert_array_equal(one_by_one.scale, whole.scale)


def test_learned_codebooks_are_given():
    weight, moment = problem(4, experts=2, out=6, in_=48)
    rows = np.sort(np.random.default_rng(5).standard_normal((12, 4)), 1)
    empty = np.zeros(weight.shape, np.uint8)
    store = Store(bits=2, group=0, zero="none", table="row")
    found = error_feedback(weight, store, moment=moment, given=Rounded(empty, table=rows), order=True)
    nearest = rows.reshape(2, 6, 1, 4)[:, :, 0][
        np.arange(2)[:, None, None],
        np.arange(6)[:, None],
        np.abs(weight[..., None] - rows.reshape(2, 6, 1, 4)).argmin(-1),
    ]
    before, after = losses(weight, nearest, moment), losses(weight, found.values(store), moment)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()

    scale, table = np.ones((2, 6, 3)), np.array([[-1.5, -0.5, 0.5, 1.5], [-1, -0.25, 0.25, 1]])
    store = Store(bits=2, group=GROUP, zero="none", table="matrix")
    found = error_feedback(weight, store, moment=moment[:1], given=Rounded(empty, scale, table=table))
    values = np.asarray(found.values(store))
    for expert in range(2):
        assert set(np.unique(values[expert]).tolist()) <= set(table[expert].tolist())
    np.testing.assert_array_equal(found.table, table)


@pytest.mark.parametrize(
    "store",
    [
        Store(bits=3, group=GROUP, scale="quantised"),
        Store(bits=4, group=GROUP, zero="none", table="mxfp4", scale="exponent"),
    ],
)
def test_what_is_found_is_what_the_file_holds(store):
    weight, moment = problem(8, experts=2, out=6, in_=48)
    plain, found = (
        round_nearest(weight, store),
        error_feedback(weight, store, moment=moment, search=False, order=True),
    )
    for own in (plain, found):
        np.testing.assert_array_equal(QuantisedArray.pack(own, store).values(), own.values(store))
    before, after = (losses(weight, own.values(store), moment) for own in (plain, found))
    assert (after <= before * (1 + 1e-5)).all()


def test_singular_moments_and_groups_of_zeros():
    weight, moment = problem(6, experts=2, out=6, in_=48)
    inputs = np.random.default_rng(7).standard_normal((48, 4))
    inputs[:5] = 0
    singular = np.stack([inputs @ inputs.T, np.zeros((48, 48))])
    weight[:, :, :GROUP] = 0
    store = Store(bits=3, group=GROUP)
    values = np.asarray(error_feedback(weight, store, moment=singular, search=False).values(store))
    assert np.isfinite(values).all()
    # Where nothing is known of the inputs, it is plain rounding.
    np.testing.assert_array_equal(values[1], round_nearest(weight, store).values(store)[1])
    with pytest.raises(JaxmoeError, match="raise the damping"):
        error_feedback(weight, store, moment=-moment)


def test_refusals():
    weight, store = jnp.ones((2, 3, 16)), Store(bits=2, group=16)
    with pytest.raises(JaxmoeError, match="moment has shape"):
        error_feedback(weight, store, moment=jnp.ones((2, 8, 8)))
    with pytest.raises(JaxmoeError, match="needs the second moment"):
        error_feedback(weight, store, moment=None)
    with pytest.raises(JaxmoeError, match="NaN"):
        error_feedback(weight * jnp.nan, store, moment=jnp.eye(16)[None])
    with pytest.raises(JaxmoeError, match="learned"):
        error_feedback(weight, Store(bits=2, group=0, zero="none", table="row"), moment=jnp.eye(16)[None])
