"""Refinement against numpy in float64: the error falls, ends where no single move helps, and never rises."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.quantised import held_scales
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.solvers.refinement import refine
from jaxmoe.solvers.rounding import round_nearest

EXPERTS, OUT, IN = 2, 6, 16
DAMPING = 0.01


def matrices(seed=0):
    """Return weights, correlated moments, and these as the refinement sees them, damped."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((EXPERTS, OUT, IN)).astype(np.float32)
    inputs = rng.standard_normal((EXPERTS, 40, IN)) @ (np.eye(IN) + 0.3 * rng.standard_normal((IN, IN)))
    moment = np.einsum("eti,etj->eij", inputs, inputs) / 40
    mean = np.trace(moment, axis1=1, axis2=2) / IN
    return weight, moment.astype(np.float32), moment + DAMPING * mean[:, None, None] * np.eye(IN)


def error(weight, rounded, store, matrix):
    """Return the weighted error of every row, in float64."""
    rest = weight.astype(np.float64) - np.asarray(rounded.values(store), np.float64)
    return np.einsum("eri,eij,erj->er", rest, matrix, rest)


def begin(weight, store):
    """Return a rounding to start from; learned codebooks begin at quantiles."""
    if store.table not in ("row", "matrix"):
        return round_nearest(weight, store)
    each = EXPERTS * (OUT if store.table == "row" else 1)
    table = np.quantile(weight.reshape(each, -1), (np.arange(2**store.bits) + 0.5) / 2**store.bits, axis=1).T
    table = np.asarray(jnp.asarray(table, jnp.bfloat16), np.float32)
    codes = np.abs(weight.reshape(each, -1, 1) - table[:, None]).argmin(2).reshape(weight.shape)
    scale = None if store.table == "row" else np.ones((EXPERTS, OUT, store.groups(IN)), np.float32)
    return Rounded(codes.astype(np.uint8), scale, None, table)


STORES = [
    Store(bits=2, group=8),
    Store(bits=3, group=8, zero="real"),
    Store(bits=4, group=8, zero="none", table="mxfp4", scale="exponent"),
    Store(bits=2, group=8, zero="none", table="matrix"),
    Store(bits=2, group=0, zero="none", table="row"),
]


@pytest.mark.parametrize("store", STORES, ids=str)
def test_the_error_falls_until_no_move_of_one_number_helps(store):
    weight, moment, matrix = matrices()
    start = begin(weight, store)
    found = [refine(weight, start, store, moment, turns=turns) for turns in (0, 1, 40)]
    errors = [error(weight, own, store, matrix) for own in (start, *found)]
    np.testing.assert_array_equal(errors[1], errors[0])
    # The codebook of a matrix serves all of its rows together.
    own = [x.sum(1) if store.table == "matrix" else x for x in errors]
    assert (own[2] <= own[1] * (1 + 1e-5)).all()
    assert (own[3] <= own[2] * (1 + 1e-5)).all()
    assert own[2].sum() < 0.8 * own[1].sum()
    last = found[-1]
    codes = np.asarray(last.codes)
    for place in np.ndindex(EXPERTS, 2, IN):
        for code in range(2**store.bits):
            other = codes.copy()
            other[place] = code
            moved = error(weight, last._replace(codes=other), store, matrix)
            assert moved[place[:2]] >= errors[3][place[:2]] * (1 - 1e-4), (place, code)
    for name in ("scale", "zero", "table"):
        array = getattr(last, name)
        # Between powers of two, and between whole zeros, there is nothing.
        if array is None or store.scale == "exponent" or (store.zero == "integer" and name == "zero"):
            continue
        for factor in (0.97, 1.03):
            for place in np.ndindex(*np.shape(array)):
                other = np.array(array)
                other[place] *= factor
                moved = error(weight, last._replace(**{name: other}), store, matrix)
                assert moved.sum() >= errors[3].sum() * (1 - 1e-5), (name, place)


def test_what_is_held_stays_what_the_file_can_hold():
    weight, moment, _ = matrices(1)
    store = Store(bits=3, group=8, zero="real")
    found = refine(weight, round_nearest(weight, store), store, moment)
    for array in (found.scale, found.zero):
        np.testing.assert_array_equal(array, jnp.asarray(array, jnp.bfloat16).astype(jnp.float32))
    assert found.codes.dtype == jnp.uint8
    assert int(found.codes.max()) <= 7
    assert float(found.scale.min()) > 0


def test_scales_of_eight_bits_stay_such():
    weight, moment, matrix = matrices(4)
    store = Store(bits=2, group=8, scale="quantised")
    start = round_nearest(weight, store)
    start = start._replace(scale=held_scales(start.scale, store))
    found = refine(weight, start, store, moment)
    np.testing.assert_array_equal(found.scale, held_scales(found.scale, store))
    before, after = (error(weight, own, store, matrix).sum(1) for own in (start, found))
    assert (after < 0.8 * before).all()
    assert not np.array_equal(start.scale, found.scale)


def test_one_group_gets_the_scale_of_least_squares():
    weight, moment, matrix = matrices(2)
    store = Store(bits=3, group=0, zero="none", scale="float32")
    found = refine(weight, round_nearest(weight, store), store, moment, turns=1)
    level = np.asarray(found.codes, np.float64) - 4
    best = np.einsum("eri,eij,erj->er", level, matrix, weight) / np.einsum("eri,eij,erj->er", level, matrix, level)
    np.testing.assert_allclose(found.scale[..., 0], best, rtol=1e-4)


def test_experts_are_refined_alone_and_under_a_shared_moment():
    weight, moment, _ = matrices(3)
    store = Store(bits=2, group=8)
    start = round_nearest(weight, store)
    shared = refine(weight, start, store, moment[:1])
    for expert in range(EXPERTS):
        own = Rounded(*(None if x is None else x[expert : expert + 1] for x in start))
        alone = refine(weight[expert : expert + 1], own, store, moment[:1])
        np.testing.assert_array_equal(alone.codes[0], shared.codes[expert])


def test_zeros_everywhere_stay_finite():
    store = Store(bits=2, group=8)
    nothing = np.zeros((1, 2, IN), np.float32)
    found = refine(nothing, round_nearest(nothing, store), store, np.zeros((1, IN, IN), np.float32))
    np.testing.assert_array_equal(found.values(store), nothing)


@pytest.mark.parametrize(
    ("moment", "turns", "message"),
    [
        (np.eye(IN - 1)[None], 1, "give .1 or 2, 16, 16"),
        (np.ones((1, IN)), 1, "give .1 or 2, 16, 16"),
        (np.eye(IN)[None], -1, "-1 turns"),
    ],
)
def test_bad_input(moment, turns, message):
    weight, *_ = matrices()
    store = Store(bits=2, group=8)
    with pytest.raises(JaxmoeError, match=message):
        refine(weight, round_nearest(weight, store), store, moment, turns=turns)
