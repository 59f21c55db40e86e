"""Values under a hash and the largest entries: optimal, as much as theory says, and fit for their terms."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Hashed, Sparse
from jaxmoe.solvers.residual import hashed_residual, largest_entries

ORDER = [2, 4, 0, 1, 3]


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def term_of(residual, *, seed=0, order=None, **options) -> Hashed:
    abstract = Hashed.abstract(residual.shape, "float32", ordered=order is not None, **options)
    values = hashed_residual(residual, seed=seed, order=order, **options)
    own = {} if order is None else {"order": jnp.asarray([order], jnp.int32)}
    return replace(abstract, values=values, seed=jnp.full((1, 1), seed, jnp.int32), **own)


def squares(x) -> float:
    return float(np.sum(np.asarray(x, np.float64) ** 2))


CASES = [
    {"buckets": 7},
    {"buckets": 11, "size": 2, "order": ORDER, "seed": 3},
    {"buckets": 11, "size": 2, "balanced": False, "seed": 8},
    {"buckets": 30, "size": 5},
]


@pytest.mark.parametrize("options", CASES)
def test_hashed_residual_is_the_least_squares_solution(options):
    """The gradient at it vanishes, it keeps the norm, and what it takes off the error is its own energy."""
    residual = noise(5, 3, 8)
    term = term_of(residual, **options)

    def error(values):
        return jnp.sum((residual - replace(term, values=values).materialize()) ** 2)

    np.testing.assert_allclose(jax.grad(error)(term.values), 0, atol=2e-5)
    assert squares(term.materialize()) == pytest.approx(squares(term.values), rel=1e-5)
    assert float(error(term.values)) == pytest.approx(squares(residual) - squares(term.values), rel=1e-5)
    compiled = jax.jit(lambda x: hashed_residual(x, **options))(residual)
    np.testing.assert_allclose(compiled, term.values, atol=1e-6)


@pytest.mark.parametrize("balanced", [True, False])
def test_hash_takes_its_share_of_the_energy(balanced):
    """buckets / entries of zero-mean noise, whatever the values: within four standard deviations."""
    residual, count = noise(4, 50, 60, seed=1), 360
    share = squares(hashed_residual(residual, buckets=count, size=4, balanced=balanced)) / squares(residual)
    assert share == pytest.approx(count / residual.size, rel=4 * np.sqrt(2 / count))


def test_as_many_buckets_as_entries_reproduce():
    residual = noise(3, 4, 5)
    np.testing.assert_allclose(term_of(residual, buckets=40, size=2).materialize(), residual, atol=1e-6)
    with pytest.raises(JaxmoeError, match="41 buckets"):
        hashed_residual(residual, buckets=41, size=2)


def test_same_seed_gives_the_same_map_in_another_process():
    residual, program = (
        noise(2, 4, 5),
        (
            "import numpy as np, jax.numpy as jnp; from jaxmoe.solvers.residual import hashed_residual;"
            "x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)), jnp.float32);"
            "print(*hashed_residual(x, buckets=6, seed=17)[0].tolist())"
        ),
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    own, other = (hashed_residual(residual, buckets=6, seed=seed)[0].tolist() for seed in (17, 18))
    assert [float(x) for x in done.stdout.split()] == own
    assert own != other


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(0, 99), st.data())
def test_largest_entries(experts, seed, data):
    """The error falls by exactly what is kept, and nothing that is left is larger."""
    # Every other number of them would be compiled anew.
    entries = data.draw(st.sampled_from((0, 1, experts * 5, experts * 12)))
    # Few different values: ties are common.
    residual = np.random.default_rng(seed).integers(-4, 5, (experts, 3, 4)).astype(np.float32)
    values, indices, counts = largest_entries(jnp.asarray(residual), entries=entries)
    assert values.shape == indices.shape == (1, entries)
    assert indices.dtype == counts.dtype == jnp.int32
    term = replace(
        Sparse.abstract(residual.shape, "float32", entries=entries), values=values, indices=indices, counts=counts
    )
    again = Sparse.from_tensors(term.tensors(), term.spec(), residual.shape)
    rest = residual - np.asarray(again.materialize())
    assert squares(rest) == squares(residual) - squares(values)
    # Ties go to the first places: the choice is that of a stable sort.
    chosen = np.sort(np.argsort(-np.abs(residual).reshape(-1), kind="stable")[:entries])
    owners = np.repeat(np.arange(experts), np.asarray(counts)[0])
    np.testing.assert_array_equal(owners * 12 + np.asarray(indices)[0], chosen)


def test_largest_entries_refuses_more_than_there_are():
    with pytest.raises(JaxmoeError, match="25 entries of 24"):
        largest_entries(noise(2, 3, 4), entries=25)
