"""A matrix outside of the routed experts as a sum of any terms: product, count, files and refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLinear, Dense, Grouped, LinearShape, LowRank, Shared, SharedBasis, Sparse

SIZES = LinearShape(out=6, in_=4)
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


TERMS = {
    "dense": (Dense(weight=draw(1, 6, 4)),),
    "low_rank": (LowRank(left=draw(1, 6, 2), right=draw(1, 2, 4)),),
    "basis": (SharedBasis(coefficients=draw(1, 6, 3), bases=draw(2, 3, 4), mixing=draw(1, 2), activation="tanh"),),
    "ragged": (Grouped.build(draw(1, 4, 3), draw(1, 3, 6), [2], transposed=True),),
    "base": (Shared.build(draw(6, 4), experts=1, kept=[0, 3], axis="in"),),
    "sum": (
        LowRank(left=draw(1, 6, 1), right=draw(1, 1, 4)),
        Sparse(
            values=draw(1, 2),
            indices=np.array([[3, 17]], np.int32),
            counts=np.array([[2]], np.int32),
            experts=1,
            out=6,
            in_=4,
        ),
    ),
}


def linear(name) -> CompressedLinear:
    return CompressedLinear(terms=TERMS[name], sizes=SIZES).check()


@pytest.mark.parametrize("name", TERMS)
def test_product_is_that_of_the_matrix(name):
    made, x = linear(name), draw(2, 5, 4)
    dense = np.asarray(made.materialize())
    assert dense.shape == (6, 4)
    np.testing.assert_allclose(made.apply(jnp.asarray(x)), x @ dense.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made.apply(jnp.asarray(x[0, 0])), x[0, 0] @ dense.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_reads_back_what_it_wrote(name):
    made = linear(name)
    tensors = {key: np.asarray(x) for key, x in made.tensors().items()}
    assert all(x.ndim == 2 and key[0].isdigit() for key, x in tensors.items())
    again = CompressedLinear.from_tensors(tensors, made.spec(), SIZES)
    np.testing.assert_array_equal(again.materialize(), made.materialize())
    assert again.count().numbers == sum(x.size for x in tensors.values()) == made.count().numbers


def test_work_of_factors_is_their_products():
    assert linear("low_rank").work() == (20.0, 40.0)
    assert linear("dense").work() == (24.0, 48.0)


def test_what_does_not_fit_is_refused():
    made = linear("low_rank")
    with pytest.raises(JaxmoeError, match=r"0 \(low_rank\): there is no right"):
        CompressedLinear.from_tensors({"0.left": made.tensors()["0.left"]}, made.spec(), SIZES)
    with pytest.raises(JaxmoeError, match=r"1\.dense belong to no term"):
        CompressedLinear.from_tensors({**made.tensors(), "1.dense": draw(6, 4)}, made.spec(), SIZES)
    with pytest.raises(JaxmoeError, match="unknown term 'other' in 0: this version knows dense"):
        CompressedLinear.from_tensors({}, [{"kind": "other"}], SIZES)
    with pytest.raises(JaxmoeError, match="no term"):
        CompressedLinear.from_tensors({}, [], SIZES)
    with pytest.raises(JaxmoeError, match=r"shape \(1, 6, 4\), not \(1, 6, 5\)"):
        CompressedLinear(terms=TERMS["dense"], sizes=LinearShape(6, 5)).check()
    for wrong in (None, {}, "dense", [3], [{"kind": []}]):
        with pytest.raises(JaxmoeError):
            CompressedLinear.from_tensors(made.tensors(), wrong, SIZES)
