"""Batches of decompositions: numpy's values, derivatives, and no way to wait for each other on CPU."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.solvers import channels, decompositions, group_spectra, mixture, shared_right, weighted_svd
from jaxmoe.solvers.decompositions import cholesky, eigh, eigvalsh, orthonormal, solve, solve_lower
from jaxmoe.solvers.variable_projection import variable_projection


def positive(*batch, side=6, seed=0):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(*batch, side, side))
    return roots @ np.swapaxes(roots, -1, -2) + np.eye(side)


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)])
def test_agrees_with_numpy(batch):
    with jax.enable_x64(True):
        matrix = positive(*batch)
        factor, right = np.linalg.cholesky(matrix), np.random.default_rng(1).normal(size=(*batch, 6, 4))
        values, vectors = (np.asarray(x) for x in eigh(matrix))
        basis = np.asarray(orthonormal(right))
        found = {
            "cholesky": (cholesky(matrix), factor),
            "eigvalsh": (eigvalsh(matrix), np.linalg.eigvalsh(matrix)),
            "eigh": (vectors * values[..., None, :] @ np.swapaxes(vectors, -1, -2), matrix),
            "orthonormal": (basis @ np.swapaxes(basis, -1, -2) @ right, right),
            "orthonormal columns": (np.swapaxes(basis, -1, -2) @ basis, np.broadcast_to(np.eye(4), (*batch, 4, 4))),
            "solve": (solve(matrix, right), np.linalg.solve(matrix, right)),
            "lower": (solve_lower(factor, right), np.linalg.solve(factor, right)),
            "transposed": (
                solve_lower(factor, right, transpose=True),
                np.linalg.solve(np.swapaxes(factor, -1, -2), right),
            ),
            "from the right": (
                solve_lower(factor, np.swapaxes(right, -1, -2), left_side=False),
                np.swapaxes(right, -1, -2) @ np.linalg.inv(factor),
            ),
        }
        for name, (ours, theirs) in found.items():
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9, err_msg=name)


def test_has_derivatives_and_batches():
    with jax.enable_x64(True):
        matrix = jnp.asarray(positive(3))
        gradient = jax.grad(lambda x: jnp.sum(jnp.log(jnp.diagonal(cholesky(x), axis1=1, axis2=2))))(matrix)
        np.testing.assert_allclose(gradient, np.linalg.inv(np.asarray(matrix)) / 2, rtol=1e-9)
        np.testing.assert_allclose(jax.vmap(cholesky)(matrix), cholesky(matrix), rtol=1e-12)


def lapack_batches(function, *arguments) -> set[int]:
    """Return how many matrices the LAPACK calls of a function's CPU program take at once."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()
    operands = re.findall(r"custom_call @lapack_\w+\(.*?: \(tensor<([0-9x]*)x?[a-z]\w*>", text)
    assert operands, "no LAPACK call found: the test looks for the wrong thing"
    shapes = [[int(size) for size in shape.split("x") if size] for shape in operands]
    return {int(np.prod(shape[:-2])) for shape in shapes}


WEIGHT, TALL = np.ones((4, 6, 10), np.float32), np.ones((4, 10, 6), np.float32)
MOMENT, ROWS = positive(4, side=10).astype(np.float32), positive(4, side=6).astype(np.float32)
PROGRAMS = {
    "svd": (partial(weighted_svd.weighted_svd, rank=3), WEIGHT),
    "svd with moments": (
        lambda w, c, r: weighted_svd.weighted_svd(w, rank=3, column_moment=c, row_moment=r),
        WEIGHT,
        MOMENT,
        ROWS,
    ),
    "svd of tall matrices": (lambda w, c: weighted_svd.weighted_svd(w, rank=3, column_moment=c), TALL, ROWS),
    "energies": (lambda w, c: weighted_svd.weighted_energies(w, column_moment=c), TALL, ROWS),
    "groups": (lambda w, c, r: group_spectra.group_spectra(w, size=2, moment=c, row_moment=r), WEIGHT, MOMENT, ROWS),
    "group energies": (lambda w, c: group_spectra.group_energies(w, size=2, moment=c), WEIGHT, MOMENT),
    "shared right": (lambda w, c: shared_right.shared_right(w, rank=3, moment=c), WEIGHT, MOMENT),
    "leverage": (partial(channels.ridge_leverage, ridge=0.1), MOMENT),
    "inverse": (mixture.lower_inverse, np.tril(positive(4, side=40)).astype(np.float32)),
    "mixture": (
        lambda w, c, r: variable_projection(w, bases=2, rank=3, steps=4, trial=2, moment=c, row_moment=r),
        WEIGHT,
        MOMENT,
        ROWS,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_spreads_a_lapack_call(name, monkeypatch):
    """What goes one by one has nothing to spread over threads, so that nothing waits for a thread."""
    function, *arguments = PROGRAMS[name]
    if not decompositions.BLOCKING:
        monkeypatch.setattr(decompositions, "BLOCKING", True)
        # What was traced before, as this version of JAX allows, must not be found again.
        jax.clear_caches()
    assert lapack_batches(lambda *x: function(*x), *arguments) == {1}


BUSY = """
import os, sys
os.sched_setaffinity(0, map(int, sys.argv[1:]))
from concurrent.futures import ThreadPoolExecutor
import jax, jax.numpy as jnp
from jaxmoe.solvers.decompositions import cholesky
from jaxmoe.solvers.mixture import lower_inverse
roots = jax.random.normal(jax.random.key(0), (32, 180, 180))
grams = roots @ roots.swapaxes(1, 2) + 180 * jnp.eye(180)
inverse, factor = jax.jit(lower_inverse), jax.jit(cholesky)
together = jax.jit(lambda x: (cholesky(x), cholesky(x[:16] + 1) @ x[:16], x @ x, x @ x.swapaxes(1, 2)))
factors = jax.block_until_ready(factor(grams))
for _ in range(100):
    jax.block_until_ready((inverse(factors), together(grams)))
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: jax.block_until_ready(factor(grams)), range(100)))
print("done")
"""


@pytest.mark.parametrize("cores", [1, 2])
def test_never_hangs(cores):
    """Unsafe, a program like these stopped within the first fifty calls, at 0 % of a core, on two cores."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < cores:
        pytest.skip(f"cannot be pinned to {cores} cores")
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    ran = subprocess.run(
        [sys.executable, "-c", BUSY, *map(str, chosen)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.stdout.strip() == "done", ran.stderr
