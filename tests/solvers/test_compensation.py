"""Rounding and compensator in turn: known errors, invariants, every expert by itself, and MiLo's ranks."""

import jax.numpy as jnp
import numpy as np
import pytest
from shapes import unchecked

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.store import Store
from jaxmoe.solvers.compensation import (
    closest_factors,
    compensate,
    excess_kurtosis,
    published_ranks,
    weighted_errors,
)
from jaxmoe.solvers.rounding import round_nearest

STORE = Store(bits=2, group=8, scale="float32")
TOY = np.random.default_rng(0).standard_normal((8, 16))[None]


def nearest(weight):
    return round_nearest(weight, STORE)


def toy(rank, rounds, **options):
    return compensate(TOY, STORE, ranks=np.array([rank]), rounds=rounds, rounding=nearest, **options)


def moment_of(side, seed=1):
    inputs = np.random.default_rng(seed).normal(size=(200, side)) * np.geomspace(3, 0.3, side)
    return (inputs.T @ inputs / 200)[None]


def test_known_errors():
    """MiLo's alternation computed in numpy's float64 elsewhere: the error rises from the first round on."""
    assert weighted_errors(TOY - nearest(TOY).values(STORE), None) == pytest.approx([2.87002699], rel=1e-6)
    expected = [2.208001, 2.260836, 2.289831, 2.353502, 2.399151, 2.426190, 2.445268]
    np.testing.assert_allclose(toy(1, 6).errors[:, 0], expected, rtol=1e-5)
    errors = toy(2, 6).errors[:, 0]
    assert errors[0] == pytest.approx(1.834301, rel=1e-5)
    assert (errors.argmin(), errors.min()) == (5, pytest.approx(1.833215, rel=1e-5))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_round_of_every_expert_is_returned(weighted):
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(5, 8, 16)) * np.geomspace(0.5, 2, 5)[:, None, None]
    moment = moment_of(16) if weighted else None
    ranks = np.array([0, 1, 2, 3, 8])
    found = compensate(weight, STORE, ranks=ranks, rounds=4, rounding=nearest, moment=moment)
    left, right = (np.asarray(x, np.float64) for x in found.factors[:2])
    rest = weight - np.asarray(found.rounded.values(STORE), np.float64) - left @ right
    root = np.eye(16) if moment is None else np.linalg.cholesky(moment[0])
    np.testing.assert_allclose(np.linalg.norm(rest @ root, axis=(1, 2)), found.errors.min(0), rtol=1e-4, atol=1e-4)
    # No worse than the first round, and that no worse than none; without a rank all are alike, a full one is exact.
    alone = weighted_errors(weight - nearest(weight).values(STORE), moment)
    assert (found.errors.min(0) <= found.errors[0]).all()
    assert (found.errors[0, :4] <= alone[:4]).all()
    np.testing.assert_allclose(found.errors[:, 0], alone[0])
    assert found.errors[0, 4] < 1e-4 * alone[4]
    for factor, axis in ((left, 1), (right, 2)):
        assert ((np.linalg.norm(factor, axis=axis) > 0).sum(1) == ranks).all()
    # Experts do not see each other.
    one = compensate(weight[2:3], STORE, ranks=ranks[2:3], rounds=4, rounding=nearest, moment=moment)
    np.testing.assert_array_equal(one.rounded.codes[0], found.rounded.codes[2])


def test_factors_are_the_closest():
    moment = moment_of(16)
    found = closest_factors(TOY, np.array([3]), moment)
    error = np.asarray(weighted_errors(TOY - np.asarray(found.left) @ np.asarray(found.right), moment))
    singular = np.linalg.svd(TOY[0] @ np.linalg.cholesky(moment[0]), compute_uv=False)
    assert error[0] == pytest.approx(np.linalg.norm(singular[3:]), rel=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.left, axis=1), np.linalg.norm(found.right, axis=2), rtol=1e-5)


def test_held_factors_take_part():
    """What the factors lose by being held in few bits is in the error, and the next round rounds around it."""
    held = Store(bits=3, group=0, zero="none", scale="float32")

    def hold(rest, factors):
        left = jnp.swapaxes(round_nearest(jnp.swapaxes(factors.left, 1, 2), held).values(held), 1, 2)
        right = round_nearest(factors.right, held)
        return factors._replace(left=left, right=right.values(held), stored=right)

    found = toy(2, 5, hold=hold)
    rest = TOY - np.asarray(found.rounded.values(STORE)) - np.asarray(found.factors.left @ found.factors.right)
    assert np.linalg.norm(rest) == pytest.approx(found.errors.min(), rel=1e-5)
    assert found.errors.min() > toy(2, 5).errors.min()
    np.testing.assert_allclose(found.factors.stored.values(held), found.factors.right)


def test_stops_when_nothing_improves():
    assert len(toy(1, 20, tolerance=1e-4).errors) == 4
    assert len(toy(2, 7, tolerance=-1.0).errors) == 8


def test_kurtosis_and_its_ranks():
    weight = np.array([[[-1.0, 1, -1, 1, -1, 1, -1, 1]], [[0.0] * 7 + [10]], [[3.0] * 8]])
    np.testing.assert_allclose(excess_kurtosis(weight)[1:], [1.703125, -3])
    assert excess_kurtosis(np.array([[[-1.0, 1.0, -1.0, 1.0]]])) == pytest.approx(-2.4375)
    assert published_ranks(np.array([-2.4, 0.49, 1.7, 9.4, 9.6]), addend=3).tolist() == [0, 0, 32, 4096, 1024]


@pytest.mark.parametrize(("ranks", "rounds"), [([9], 1), ([-1], 1), ([1, 1], 1), ([1], -1)])
def test_impossible_ranks_are_named(ranks, rounds):
    with unchecked(), pytest.raises(JaxmoeError, match="give each expert"):
        compensate(TOY, STORE, ranks=np.array(ranks), rounds=rounds, rounding=nearest)
