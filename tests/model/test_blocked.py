"""Rows in blocks and back: reading and its transpose, against plain indexing and JAX's own rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.model import blocked
from jaxmoe.model.blocked import BlockShape, arrange, block_product, gather, gather_tokens, most_blocks, scatter

SIZE = 3


def plain(name, x, blocks):
    """What the functions say they do, left to JAX to differentiate."""
    if name == "scatter":
        return x.reshape(-1, SIZE)[blocks.place]
    rows, index = x.reshape(-1, SIZE), blocks.assignment
    if name == "gather_tokens":
        index = index // blocks.place.shape[1]
    return jnp.where((index < len(rows))[..., None], rows[jnp.minimum(index, len(rows) - 1)], 0)


@pytest.mark.parametrize("function", [gather, gather_tokens, scatter], ids=lambda function: function.__name__)
@settings(max_examples=15, deadline=None)
@given(
    # Few shapes, since each is compiled.
    sizes=st.sampled_from([(1, 1, 3, 1), (12, 3, 4, 5), (7, 2, 6, 2)]),
    seed=st.integers(0, 999),
)
def test_values_and_gradients(function, sizes, seed):
    tokens, choices, experts, rows = sizes
    rng = np.random.default_rng(seed)
    chosen = np.array([rng.choice(experts, choices, replace=False) for _ in range(tokens)], np.int32)
    shape = BlockShape(rows, most_blocks(chosen.size, experts, rows))
    blocks = arrange(jnp.asarray(chosen), experts, shape)
    axes = {"gather": (tokens, choices), "gather_tokens": (tokens,), "scatter": (shape.blocks, rows)}
    x = jnp.asarray(rng.standard_normal((*axes[function.__name__], SIZE)), jnp.float32)
    found, back = jax.vjp(lambda x: function(x, blocks), x)
    expected, own = jax.vjp(lambda x: plain(function.__name__, x, blocks), x)
    assert np.array_equal(found, expected)
    gradient = jnp.asarray(rng.standard_normal(found.shape), jnp.float32)
    np.testing.assert_allclose(back(gradient)[0], own(gradient)[0], rtol=1e-6, atol=1e-6)


def test_there_and_back():
    chosen = jnp.asarray([[0, 2], [2, 1], [1, 0]])
    blocks = arrange(chosen, 3, BlockShape(2, 4))
    x = jnp.arange(18.0).reshape(3, 2, SIZE)
    assert np.array_equal(scatter(gather(x, blocks), blocks), x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("together", [1, 2, 4, 5, 8], ids="{} matrices at a time".format)
def test_products_and_their_gradients_equal_float64(monkeypatch, together, dtype):
    experts, out, size, rows = 3, 6, 4, 2
    monkeypatch.setattr(blocked, "_COPIES", together * out * size * 4)
    rng = np.random.default_rng(together)
    chosen = rng.integers(0, experts - 1, (10, 1)).astype(np.int32)
    blocks = arrange(jnp.asarray(chosen), experts, BlockShape(rows, 8))
    matrices = jnp.asarray(rng.standard_normal((experts, out, size)), dtype)
    left, gradient = rng.standard_normal((8, rows, size)), rng.standard_normal((8, rows, out))
    left, gradient = (np.asarray(part, np.float32) for part in (left, gradient))
    found, back = jax.vjp(block_product(blocks), jnp.asarray(left), matrices)
    owner, exact = np.asarray(blocks.expert), np.asarray(matrices, np.float64)
    np.testing.assert_allclose(found, np.einsum("bti,boi->bto", left, exact[owner]), rtol=1e-5, atol=1e-5)
    to_left, to_matrices = back(jnp.asarray(gradient))
    np.testing.assert_allclose(to_left, np.einsum("bto,boi->bti", gradient, exact[owner]), rtol=1e-5, atol=1e-5)
    expected = np.zeros_like(exact)
    np.add.at(expected, owner, np.einsum("bto,bti->boi", gradient, left))
    assert to_matrices.dtype == dtype
    # Gradients are stored, and added up over an expert's blocks, in the type of the matrices.
    close = 1e-5 if dtype == jnp.float32 else 16 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(to_matrices, np.float64), expected, atol=close * np.abs(expected).max())
    assert np.abs(expected).max() > 1
