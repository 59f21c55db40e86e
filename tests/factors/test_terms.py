"""Every term: materialize against numpy, apply against materialize, count against the tensors, file layout."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.special import erf

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense, LayerShape, LowRank, SharedBasis
from jaxmoe.factors.layer import KINDS
from jaxmoe.factors.shared_basis import ACTIVATIONS

SIZES = LayerShape(experts=5, hidden=7, intermediate=4)

NUMPY = {
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "wavelet": lambda x: x * (1 - x**2) / (1 + x**2) ** 3,
}


def filled(term, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), term)


def terms(shape, dtype="float32"):
    return {
        "dense": Dense.abstract(shape, dtype),
        "low_rank": LowRank.abstract(shape, dtype, rank=2),
        "shared_basis": SharedBasis.abstract(shape, dtype, bases=3, rank=2, activation="silu"),
        "transposed": SharedBasis.abstract(shape, dtype, bases=3, rank=2, activation="tanh", transposed=True),
        "mean": SharedBasis.abstract(shape, dtype, bases=2, rank=3, activation="tanh", mean=True),
    }


def oracle(term):
    """Materialise in numpy float64, expert by expert, from the formulas."""
    experts = term.shape[0]
    arrays = {name: np.asarray(value, np.float64) for name, value in vars(term).items() if hasattr(value, "shape")}
    if isinstance(term, Dense):
        return arrays["weight"]
    if isinstance(term, LowRank):
        return np.stack([arrays["left"][e] @ arrays["right"][e] for e in range(experts)])
    dense = []
    for e in range(experts):
        blend = sum(arrays["mixing"][e, j] * arrays["bases"][j] for j in range(len(arrays["bases"])))
        matrix = arrays["coefficients"][e] @ NUMPY[term.activation](blend)
        dense.append(matrix.T if term.transposed else matrix)
    return np.stack(dense) + (arrays["mean"] if term.mean is not None else 0)


@pytest.mark.parametrize("name", list(terms((5, 4, 7))))
class TestTerm:
    def test_materialize(self, name):
        term = filled(terms((5, 4, 7))[name])
        np.testing.assert_allclose(term.materialize(), oracle(term), atol=1e-5)
        np.testing.assert_allclose(term.materialize(slice(1, 3)), term.materialize()[1:3], atol=1e-6)
        assert term.materialize().shape == term.shape == (5, 4, 7)

    def test_apply(self, name):
        term = filled(terms((5, 4, 7))[name])
        rows = np.random.default_rng(1).normal(size=(5, 6, 7)).astype(np.float32)
        np.testing.assert_allclose(
            term.apply(jnp.asarray(rows)), np.einsum("eti,eoi->eto", rows, oracle(term)), atol=2e-5
        )
        np.testing.assert_allclose(
            jax.jit(lambda t, x: t.apply(x))(term, rows), term.apply(jnp.asarray(rows)), atol=1e-5
        )

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_count_and_layout(self, name, dtype):
        abstract = terms((5, 4, 7), dtype)[name]
        term = filled(abstract)
        tensors = {key: np.asarray(value) for key, value in term.tensors().items()}
        assert all(value.ndim == 2 for value in tensors.values())
        assert term.count() == abstract.count()
        assert term.count().numbers == sum(value.size for value in tensors.values())
        assert term.count().bytes == sum(value.nbytes for value in tensors.values())
        assert {key: (x.shape, x.dtype) for key, x in abstract.tensors().items()} == {
            key: (x.shape, x.dtype) for key, x in tensors.items()
        }
        again = KINDS[term.kind].from_tensors(tensors, term.spec(), term.shape)
        assert again.spec() == term.spec() == abstract.spec()
        for old, new in zip(jax.tree.leaves(term), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(np.asarray(old), np.asarray(new))

    def test_is_a_pytree_that_differentiates(self, name):
        term = filled(terms((5, 4, 7))[name])
        gradient = jax.grad(lambda t: jnp.sum(t.materialize() ** 2))(term)
        assert type(gradient) is type(term)
        assert all(bool(jnp.isfinite(x).all()) and bool(jnp.any(x != 0)) for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_every_activation(activation):
    term = filled(SharedBasis.abstract((5, 4, 7), "float32", bases=2, rank=3, activation=activation))
    np.testing.assert_allclose(term.materialize(), oracle(term), atol=1e-5)


def test_published_accounting():
    """Kept fraction of the MoE layer with down untouched: the six models of the MoBE paper (Table 1)."""
    published = [
        (64, 2048, 1408, 4, 0.833),
        (64, 2048, 1408, 4, 0.833),
        (128, 2048, 768, 32, 0.750),
        (128, 4096, 1536, 32, 0.750),
        (256, 7168, 2048, 64, 0.690),
        (384, 7168, 2048, 128, 0.746),
    ]
    for experts, hidden, intermediate, bases, kept in published:
        shape = (experts, intermediate, hidden)
        count = SharedBasis.abstract(shape, "bfloat16", bases=bases, rank=intermediate, activation="silu").count()
        exact = experts * intermediate**2 + bases * intermediate * hidden + experts * bases
        assert count == (exact, 2 * exact)
        dense = experts * hidden * intermediate
        assert (2 * count.numbers + dense) / (3 * dense) == pytest.approx(kept, abs=6e-4)


def layer():
    return CompressedLayer(
        sizes=SIZES,
        terms={
            "gate_up": (filled(LowRank.abstract(SIZES.of("gate_up"), "float32", rank=2)),),
            "gate": (filled(LowRank.abstract(SIZES.of("gate"), "float32", rank=1), 1),),
            "down": (
                filled(
                    SharedBasis.abstract(
                        SIZES.of("down"), "float32", bases=2, rank=3, activation="tanh", transposed=True
                    )
                ),
                filled(Dense.abstract(SIZES.of("down"), "float32"), 2),
            ),
        },
    ).check()


def test_layer_sums_its_terms():
    own = layer()
    joined, extra = oracle(own.terms["gate_up"][0]), oracle(own.terms["gate"][0])
    expected = {
        "gate": joined[:, :4] + extra,
        "up": joined[:, 4:],
        "down": oracle(own.terms["down"][0]) + oracle(own.terms["down"][1]),
    }
    rng = np.random.default_rng(5)
    for projection, dense in expected.items():
        np.testing.assert_allclose(own.materialize(projection), dense, atol=1e-5)
        rows = rng.normal(size=(5, 3, dense.shape[2])).astype(np.float32)
        (outputs,) = own.apply(jnp.asarray(rows), (projection,))
        np.testing.assert_allclose(outputs, np.einsum("eti,eoi->eto", rows, dense), atol=3e-5)


def test_layer_round_trip_and_count():
    own = layer()
    tensors = {name: np.asarray(value) for name, value in own.tensors().items()}
    assert own.count().numbers == sum(value.size for value in tensors.values())
    again = CompressedLayer.from_tensors(tensors, own.spec(), SIZES)
    for old, new in zip(jax.tree.leaves(own), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def test_wrong_layers_are_refused():
    good = LowRank.abstract(SIZES.of("gate_up"), "float32", rank=1)
    down = LowRank.abstract(SIZES.of("down"), "float32", rank=1)
    with pytest.raises(JaxmoeError, match="no term for down"):
        CompressedLayer(sizes=SIZES, terms={"gate_up": (good,)}).check()
    with pytest.raises(JaxmoeError, match="unknown target 'both'"):
        CompressedLayer(sizes=SIZES, terms={"both": (good,), "down": (down,)}).check()
    with pytest.raises(JaxmoeError, match="shape"):
        CompressedLayer(sizes=SIZES, terms={"gate_up": (down,), "down": (down,)}).check()
    with pytest.raises(JaxmoeError, match="unknown term 'hashed'"):
        CompressedLayer.from_tensors({}, {"down": [{"kind": "hashed"}]}, SIZES)


def test_bfloat16_terms_materialize_in_float32():
    term = filled(LowRank.abstract((2, 3, 4), ml_dtypes.bfloat16, rank=2))
    assert term.materialize().dtype == jnp.float32
