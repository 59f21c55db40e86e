"""The Flax NNX face of the decoder: the same numbers as the functions, whatever the experts are stored as."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import plain_checkpoint
import pytest
from flax import nnx

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.factors import CompressedLayer, Grouped, Hashed, LowRank, Shared, SharedBasis, Sparse
from jaxmoe.model import Decoder, forward

IDS = jnp.arange(24).reshape(2, 12) * 5 % 31


def factored(sizes, seed: int) -> CompressedLayer:
    """Return random terms of two kinds, one of them over gate and up together."""
    draw = np.random.default_rng(seed).normal
    both, down = sizes.of("gate_up"), sizes.of("down")
    pair = LowRank(left=draw(size=(*both[:2], 3)) * 0.3, right=draw(size=(both[0], 3, both[2])) * 0.3)
    basis = SharedBasis(
        coefficients=draw(size=(down[0], down[2], 3)) * 0.3,
        bases=draw(size=(2, 3, down[1])),
        mixing=draw(size=(down[0], 2)),
        activation="tanh",
        transposed=True,
    )
    terms = {"gate_up": (pair,), "down": (basis,)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), CompressedLayer(terms=terms, sizes=sizes).check())


def indexed(sizes, seed: int) -> CompressedLayer:
    """Return random terms of all kinds that hold integers beside their numbers."""
    rng = np.random.default_rng(seed)
    both, down = sizes.of("gate_up"), sizes.of("down")
    base = Shared.build(rng.normal(size=both[1:]) * 0.3, experts=both[0], kept=[0, 2, 5, 6], parts=2)
    left, right = rng.normal(size=(*both[:2], 3)), rng.normal(size=(both[0], 3, both[2]))
    own = Grouped.build(0.3 * jnp.asarray(left), 0.3 * jnp.asarray(right), rng.permutation(both[0]) % 3 + 1)
    hashed = replace(
        Hashed.abstract(down, "float32", buckets=9, size=down[0]),
        values=rng.normal(size=(1, 9)),
        seed=jnp.full((1, 1), 11, jnp.int32),
    )
    sparse = replace(
        Sparse.abstract(down, "float32", entries=2 * down[0]),
        values=rng.normal(size=(1, 2 * down[0])),
        indices=jnp.arange(2 * down[0], dtype=jnp.int32)[None] * 5,
        counts=jnp.full((1, down[0]), 2, jnp.int32),
    )
    made = CompressedLayer(terms={"gate_up": (base, own), "down": (hashed, sparse)}, sizes=sizes).check()
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype), made)


@pytest.fixture(params=["dense", "factored", "indexed"], scope="module")
def stored(request, tmp_path_factory):
    """A spec and its parameters in float32."""
    model = StoredModel(plain_checkpoint.write(tmp_path_factory.mktemp("model") / "source"))
    parameters = jax.tree.map(lambda x: x.astype(jnp.float32), model.parameters())
    if request.param != "dense":
        make = {"factored": factored, "indexed": indexed}[request.param]
        for index, own in enumerate(parameters["layers"]):
            own["experts"] = make(own["experts"].sizes, index)
    return model.spec, parameters


def loss(logits):
    return jnp.mean(jax.nn.log_softmax(logits)[..., 7])


def test_logits_equal_forward(stored):
    spec, parameters = stored
    expected = forward(IDS, parameters, spec)
    decoder = Decoder(spec, parameters)
    np.testing.assert_array_equal(decoder(IDS), expected)
    np.testing.assert_allclose(nnx.jit(lambda module, ids: module(ids))(decoder, IDS), expected, rtol=0, atol=1e-4)


def test_gradients_equal_jax_grad(stored):
    spec, parameters = stored
    expected = jax.jit(jax.grad(lambda own: loss(forward(IDS, own, spec)), allow_int=True))(parameters)
    found = nnx.jit(nnx.grad(lambda module: loss(module(IDS))))(Decoder(spec, parameters))
    # The state of a module has the module's own structure: put the gradients into one to compare name by name.
    holder = Decoder(spec, jax.tree.map(jnp.zeros_like, parameters))
    nnx.update(holder, found)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(holder.parameters), strict=True
    ):
        if a.dtype == jax.dtypes.float0:
            continue
        scale = np.abs(a).max()
        assert scale > 0, path
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * scale, err_msg=str(path))


def test_state_round_trip(stored):
    spec, parameters = stored
    decoder = Decoder(spec, parameters)
    graph, state = nnx.split(decoder)
    again = nnx.merge(graph, jax.tree.map(lambda x: np.array(x), state))
    assert jax.tree.structure(again.parameters) == jax.tree.structure(dict(parameters))
    jax.tree.map(np.testing.assert_array_equal, again.parameters, dict(parameters))
    for held in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        assert type(held) is (nnx.Param if jnp.issubdtype(held[...].dtype, jnp.floating) else nnx.Variable)
    hash(graph)


def test_flax_is_imported_on_use():
    code = (
        "import sys, jaxmoe.model; assert 'flax' not in sys.modules; jaxmoe.model.Decoder; assert 'flax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
