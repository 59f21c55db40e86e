"""The Flax NNX face of the decoder: the same numbers as the functions, whatever the experts are stored as."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import plain_checkpoint
import pytest
from flax import nnx

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.factors import CompressedLayer, LowRank, SharedBasis
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


@pytest.fixture(params=["dense", "factored"], scope="module")
def stored(request, tmp_path_factory):
    """A spec and its parameters in float32."""
    model = StoredModel(plain_checkpoint.write(tmp_path_factory.mktemp("model") / "source"))
    parameters = jax.tree.map(lambda x: x.astype(jnp.float32), model.parameters())
    if request.param == "factored":
        for index, own in enumerate(parameters["layers"]):
            own["experts"] = factored(own["experts"].sizes, index)
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
    expected = jax.jit(jax.grad(lambda own: loss(forward(IDS, own, spec))))(parameters)
    found = nnx.jit(nnx.grad(lambda module: loss(module(IDS))))(Decoder(spec, parameters))
    # The state of a module has the module's own structure: put the gradients into one to compare name by name.
    holder = Decoder(spec, jax.tree.map(jnp.zeros_like, parameters))
    nnx.update(holder, found)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(holder.parameters), strict=True
    ):
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
    assert {type(leaf) for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))} == {nnx.Param}
    hash(graph)


def test_flax_is_imported_on_use():
    code = (
        "import sys, jaxmoe.model; assert 'flax' not in sys.modules; jaxmoe.model.Decoder; assert 'flax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
