"""The weighted truncated SVD against numpy in float64, its invariants, and under jit, vmap and sharding."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.solvers.weighted_svd import weighted_svd

EXPERTS, RANK = 3, 4


def root(moment):
    if moment.ndim == 1:
        return np.diag(np.sqrt(moment))
    values, vectors = np.linalg.eigh(moment)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def oracle_energy(weight, row, column, rank):
    """Squared error of the best approximation: the tail of the singular values of P W Q (Eckart and Young)."""
    left = np.eye(weight.shape[0]) if row is None else root(row)
    right = np.eye(weight.shape[1]) if column is None else root(column)
    return np.sum(np.linalg.svd(left @ weight @ right, compute_uv=False)[rank:] ** 2)


def weighted_energy(difference, row, column):
    left = np.eye(difference.shape[0]) if row is None else root(row)
    right = np.eye(difference.shape[1]) if column is None else root(column)
    return np.sum((left @ difference @ right) ** 2)


def moment(rng, kind, side):
    if kind is None:
        return None
    if kind == "diagonal":
        return rng.uniform(0.05, 4, size=(EXPERTS, side))
    samples = rng.normal(size=(EXPERTS, 3 * side, side)) * np.geomspace(1, 0.05, side)
    full = np.einsum("esi,esj->eij", samples, samples) / (3 * side)
    return full[:1] if kind == "shared" else full


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8)])
@pytest.mark.parametrize("row", [None, "diagonal", "shared", "full"])
@pytest.mark.parametrize("column", [None, "diagonal", "shared", "full"])
def test_reaches_the_least_weighted_error(shape, row, column):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(EXPERTS, *shape))
    rows, columns = moment(rng, row, shape[0]), moment(rng, column, shape[1])
    with jax.enable_x64(True):
        fit = weighted_svd(jnp.asarray(weight), rank=RANK, row_moment=rows, column_moment=columns)
        left, right, energies = (np.asarray(x) for x in fit)
    assert left.shape == (EXPERTS, shape[0], RANK)
    assert right.shape == (EXPERTS, RANK, shape[1])
    for e in range(EXPERTS):
        own = [None if m is None else m[min(e, len(m) - 1)] for m in (rows, columns)]
        least = oracle_energy(weight[e], *own, RANK)
        reached = weighted_energy(weight[e] - left[e] @ right[e], *own)
        assert reached == pytest.approx(least, rel=1e-8)
        assert energies[e, RANK:].sum() == pytest.approx(least, rel=1e-8)
        plain = np.linalg.svd(weight[e])
        truncated = (plain[0][:, :RANK] * plain[1][:RANK]) @ plain[2][:RANK]
        assert reached <= weighted_energy(weight[e] - truncated, *own) * (1 + 1e-9)


def test_float32_matches_the_oracle():
    weight = np.random.default_rng(1).normal(size=(4, 40, 64)).astype(np.float32)
    fit = weighted_svd(jnp.asarray(weight), rank=17)
    u, s, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    product = np.einsum("eor,er,eri->eoi", u[:, :, :17], s[:, :17], v[:, :17])
    np.testing.assert_allclose(np.asarray(fit.left @ fit.right), product, atol=2e-5)


def test_singular_moment_loses_nothing_that_the_inputs_can_reach():
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(1, 9, 12))
    seen = rng.normal(size=(12, RANK))
    with jax.enable_x64(True):
        fit = weighted_svd(jnp.asarray(weight), rank=RANK, column_moment=jnp.asarray(seen @ seen.T)[None])
        answer = np.asarray(fit.left @ fit.right)[0]
    np.testing.assert_allclose(answer @ seen, weight[0] @ seen, atol=1e-9)


def test_full_rank_is_exact():
    weight = np.random.default_rng(3).normal(size=(2, 6, 10)).astype(np.float32)
    fit = weighted_svd(jnp.asarray(weight), rank=6)
    np.testing.assert_allclose(np.asarray(fit.left @ fit.right), weight, atol=1e-5)


def test_jit_and_vmap_equal_the_plain_call():
    weight = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 8, 12)), jnp.float32)
    function = functools.partial(weighted_svd, rank=5)

    def product(fit):
        return np.asarray(fit.left @ fit.right)

    plain = np.stack([product(function(layer)) for layer in weight])
    np.testing.assert_allclose(product(jax.vmap(function)(weight)), plain, atol=1e-5)
    np.testing.assert_allclose(product(jax.jit(function)(weight[0])), plain[0], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 9}, "1 to 8"),
        ({"rank": 2, "row_moment": jnp.ones((1, 9))}, "row_moment"),
        ({"rank": 2, "column_moment": jnp.ones((2, 10, 10))}, "column_moment"),
    ],
)
def test_wrong_input_is_named(options, words):
    with pytest.raises(JaxmoeError, match=words):
        weighted_svd(jnp.ones((3, 8, 10)), **options)


SHARDED = """
import functools, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxmoe.solvers.decompositions import BLOCKING
from jaxmoe.solvers.weighted_svd import weighted_svd
assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
weight = rng.normal(size=(16, 12, 20)).astype(np.float32)
samples = rng.normal(size=(64, 20)).astype(np.float32)
moment = (samples.T @ samples)[None] / 64
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("expert",)), PartitionSpec("expert"))
for options in ({}, {"column_moment": moment}):
    for matrices in (weight, weight.swapaxes(1, 2)) if not options else (weight,):
        fit = jax.jit(functools.partial(weighted_svd, rank=5))
        placed = jax.device_put(matrices, sharding)
        text = fit.lower(placed, **options).compile().as_text()
        words = ("all-gather", "all-reduce", "all-to-all", "collective", "reduce-scatter")
        found = [word for word in words if word in text]
        spread, single = fit(placed, **options), fit(matrices, **options)
        # Where matrices have to go one by one, they come together for it.
        assert BLOCKING or not found, found
        assert BLOCKING or spread.left.sharding.is_equivalent_to(sharding, 3)
        np.testing.assert_allclose(spread.left @ spread.right, single.left @ single.right, atol=1e-5)
print("equal")
"""


def test_eight_devices_equal_one_without_collectives():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    # Eight devices that wait for each other need as many threads, however few cores there are.
    environment["NPROC"] = "32"
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr
