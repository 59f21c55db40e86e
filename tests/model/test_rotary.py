"""The rotation of queries and keys against complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.model.rotary import rotate
from jaxmoe.model.spec import Rotary


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_multiplication_by_a_complex_number(interleaved):
    """Products of a query and a key depend on their distance alone, also where only a part is rotated."""
    rng = np.random.default_rng(0)
    spec = Rotary(frequencies=(1.0, 0.1, 0.01), scale=1.5, interleaved=interleaved)
    query, key = rng.normal(size=(2, 1, 9, 2, 8)).astype(np.float32)
    found = np.einsum("bthd,bshd->bhts", rotate(jnp.asarray(query), spec), rotate(jnp.asarray(key), spec))

    def turned(x):
        pairs = x[..., 0:6:2] + 1j * x[..., 1:6:2] if interleaved else x[..., :3] + 1j * x[..., 3:6]
        return pairs * 1.5 * np.exp(1j * np.arange(9)[:, None, None] * np.array([1.0, 0.1, 0.01]))

    expected = np.einsum("bthd,bshd->bhts", turned(query), turned(key).conj()).real
    expected += np.einsum("bthd,bshd->bhts", query[..., 6:], key[..., 6:])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
