"""Bases of unequal ranks in both solvers: gradients of a plain loss, zeros that stay zero, and what the fit gains."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.shared_basis import ACTIVATIONS
from jaxmoe.solvers import basis_learning
from jaxmoe.solvers.basis_learning import learn_basis
from jaxmoe.solvers.mixture import Ragged, block_svd, reconstruct, solve_coefficients
from jaxmoe.solvers.variable_projection import reduced_objective, starts, variable_projection

E, P, Q, R = 6, 8, 24, 7
RANKS, OWNER = np.array([7, 2, 4]), np.array([0, 0, 1, 1, 1, 2])
RAGGED = Ragged(jnp.asarray(RANKS), jnp.asarray(OWNER))
SOLVERS = {
    "published": partial(learn_basis, activation="silu", patience=None),
    "projection": partial(variable_projection, activation="wavelet"),
}


def drawn(seed=0):
    return (0.02 * np.random.default_rng(seed).normal(size=(E, P, Q)) * np.geomspace(1, 0.2, Q)).astype(np.float32)


def parameters(seed=1):
    rng = np.random.default_rng(seed)
    rows = np.arange(R) < RANKS[:, None]
    return 0.5 * rng.normal(size=(3, R, Q)) * rows[:, :, None], rng.normal(size=(E, 3))


def features_of(basis, alpha, activation):
    """f of the blend, the rows of each expert's own rank: in slices, without any mask."""
    blended = [ACTIVATIONS[activation](jnp.tensordot(alpha[e], basis, 1)) for e in range(E)]
    return [blended[e][: RANKS[OWNER[e]]] for e in range(E)]


def moment_of(kind):
    if kind is None:
        return None
    inputs = np.random.default_rng(2).normal(size=(1 if kind == "pooled" else E, 60, Q)) * np.geomspace(2, 0.3, Q)
    return np.einsum("eti,etj->eij", inputs, inputs) / 60


@pytest.mark.parametrize("kind", [None, "pooled", "own"])
def test_projected_gradient_is_that_of_least_squares_over_the_own_rows(kind):
    basis, alpha = parameters()
    target, moment = drawn().astype(np.float64) * 50, moment_of(kind)
    stored = np.arange(R) < RANKS[:, None]

    def plain(both):
        lost = whole = 0.0
        for e, feature in enumerate(features_of(both[0] * stored[:, :, None], both[1], "wavelet")):
            root = jnp.eye(Q) if moment is None else jnp.linalg.cholesky(moment[e % len(moment)])
            seen, wanted = feature @ root, target[e] @ root
            left = wanted - jnp.linalg.solve(seen @ seen.T, seen @ wanted.T).T @ seen
            lost, whole = lost + jnp.sum(left**2), whole + jnp.sum(wanted**2)
        return lost / whole

    with jax.enable_x64(True):
        both = jnp.asarray(basis), jnp.asarray(alpha)
        own = None if moment is None else jnp.asarray(moment)
        evaluate = reduced_objective(jnp.asarray(target), activation="wavelet", moment=own, ragged=RAGGED)
        loss, (d_basis, d_alpha) = jax.jit(evaluate)(both)
        expected, (e_basis, e_alpha) = jax.jit(jax.value_and_grad(plain))(both)
    d_basis, d_alpha, e_basis, e_alpha = (np.asarray(x) for x in (d_basis, d_alpha, e_basis, e_alpha))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    scale = float(abs(e_basis).max())
    np.testing.assert_allclose(d_basis, e_basis, atol=2e-3 * scale)
    np.testing.assert_allclose(d_alpha, e_alpha, atol=2e-3 * float(abs(e_alpha).max()))
    assert not np.any(d_basis[~stored])


def test_steps_of_the_published_algorithm_are_adam_on_the_plain_loss():
    weight, steps = drawn(), 6
    stored = (np.arange(R) < RANKS[:, None])[:, :, None]
    sigma = weight.std(dtype=np.float64)
    wanted = jnp.asarray(weight / sigma, jnp.float32)
    coefficients, basis = block_svd(wanted, 3, R, RAGGED)

    def plain(given):
        a, b, free = given
        features = features_of(b * stored, jax.nn.softmax(free, -1), "silu")
        return sum(jnp.sum((a[e, :, : len(f)] @ f - wanted[e]) ** 2) for e, f in enumerate(features)) / wanted.size

    value_and_gradient = jax.jit(jax.value_and_grad(plain))
    now = [np.asarray(x, np.float64) for x in (coefficients * sigma, basis, jax.nn.one_hot(OWNER, 3))]
    first, second, losses = [0.0] * 3, [0.0] * 3, []
    for step in range(1, steps + 1):
        loss, gradients = value_and_gradient([jnp.asarray(x, jnp.float32) for x in now])
        losses.append(float(loss) * wanted.size / np.sum(np.square(wanted, dtype=np.float64)))
        for i, gradient in enumerate(np.asarray(g, np.float64) for g in gradients):
            first[i], second[i] = 0.9 * first[i] + 0.1 * gradient, 0.999 * second[i] + 0.001 * gradient**2
            root = np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8
            now[i] = now[i] - 0.07 * first[i] / (1 - 0.9**step) / root
    fit = learn_basis(weight, bases=3, rank=R, steps=steps, ragged=RAGGED)
    np.testing.assert_allclose(fit.losses, losses, rtol=1e-3)
    assert losses[-1] != pytest.approx(losses[0], rel=0.05)


@pytest.fixture(scope="module")
def fits():
    return {
        name: solve(drawn(), bases=3, rank=R, steps=steps, ragged=RAGGED)
        for (name, solve), steps in zip(SOLVERS.items(), (900, 250), strict=True)
    }


@pytest.mark.parametrize("name", SOLVERS)
def test_rows_beyond_the_ranks_stay_zero(fits, name):
    fit = fits[name]
    assert not np.asarray(fit.bases)[np.arange(R) >= RANKS[:, None]].any()
    beyond = np.arange(R) >= RANKS[OWNER][:, None]
    assert not np.swapaxes(np.asarray(fit.coefficients), 1, 2)[beyond].any()
    assert np.asarray(fit.bases)[np.arange(R) < RANKS[:, None]].all()


@pytest.mark.parametrize("name", SOLVERS)
def test_mixing_beats_groups_of_their_own_at_the_same_ranks(fits, name):
    """Blending all bases loses less than the best basis that every group could have for itself."""
    weight, fit = drawn().astype(np.float64), fits[name]
    activation = {"published": "silu", "projection": "wavelet"}[name]
    found = np.asarray(reconstruct(fit.coefficients, fit.bases, fit.mixing, activation), np.float64)
    tails = sum(
        np.sum(np.linalg.svd(np.concatenate(weight[group == OWNER]), compute_uv=False)[rank:] ** 2)
        for group, rank in enumerate(RANKS)
    )
    lost = np.sum((found - weight) ** 2)
    assert lost <= tails
    assert lost / np.sum(weight**2) == pytest.approx(float(np.nanmin(fit.losses)), rel=0.02)
    own = np.linalg.norm(found - weight, axis=(1, 2)) / np.linalg.norm(weight, axis=(1, 2))
    np.testing.assert_allclose(fit.error, own, rtol=1e-3, atol=1e-4)


def test_block_svd_of_unequal_ranks_is_the_best_of_each_group():
    weight = drawn().astype(np.float64)
    coefficients, bases = block_svd(jnp.asarray(drawn()), 3, R, RAGGED)
    for group, rank in enumerate(RANKS):
        members = group == OWNER
        found = np.asarray(coefficients, np.float64)[members] @ np.asarray(bases, np.float64)[group]
        tail = np.sum(np.linalg.svd(np.concatenate(weight[members]), compute_uv=False)[rank:] ** 2)
        assert np.sum((found - weight[members]) ** 2) == pytest.approx(tail, rel=1e-3)
        assert not np.asarray(bases)[group, rank:].any()


@pytest.mark.parametrize("kind", [None, "own"])
def test_coefficients_are_least_squares_on_the_own_rows(kind):
    basis, alpha = parameters()
    weight, moment = drawn(), moment_of(kind)
    found = solve_coefficients(weight, basis, alpha, activation="tanh", moment=moment, ragged=RAGGED)
    for e, feature in enumerate(features_of(basis, alpha, "tanh")):
        root = np.eye(Q) if moment is None else np.linalg.cholesky(moment[e])
        feature = np.asarray(feature, np.float64) @ root
        best = np.linalg.lstsq(feature.T, (weight[e] @ root).T, rcond=None)[0].T
        np.testing.assert_allclose(found[e, :, : len(feature)], best, rtol=2e-3, atol=1e-4)
        assert not np.any(found[e, :, len(feature) :])


def test_both_starts_respect_the_ranks():
    for basis, alpha in starts(jnp.asarray(drawn()), 3, R, jax.random.key(0), RAGGED):
        assert not np.asarray(basis)[np.arange(R) >= RANKS[:, None]].any()
        assert alpha.shape == (E, 3)
    np.testing.assert_array_equal(starts(jnp.asarray(drawn()), 3, R, jax.random.key(0), RAGGED)[0][1].argmax(1), OWNER)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "sigmoid"}, "sigmoid.0. is not 0"),
        ({"rank": Q + 1}, f"rank {Q + 1}"),
        ({"ragged": Ragged(jnp.asarray([7, 2]), RAGGED.owner)}, "2,. ranks"),
        ({"ragged": Ragged(RAGGED.ranks, jnp.asarray([0, 1]))}, "2,. owners"),
    ],
)
def test_what_cannot_be_is_refused(name, change, words):
    with pytest.raises(JaxmoeError, match=words):
        SOLVERS[name](drawn(), **({"bases": 3, "rank": R, "steps": 1, "ragged": RAGGED} | change))


def test_groups_apart_with_unequal_ranks_are_refused():
    with pytest.raises(JaxmoeError, match="fit every group by itself"):
        basis_learning.learn_basis(drawn(), bases=3, rank=R, steps=1, groups=3, ragged=RAGGED)
