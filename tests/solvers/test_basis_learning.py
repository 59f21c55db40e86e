"""Basis learning as published: against a float64 oracle of its start, loss, gradient and Adam; its known behaviour."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.solvers.basis_learning import learn_basis
from jaxmoe.solvers.mixture import owners

E, P, Q, M, R = 6, 5, 12, 3, 4


def gaussian(*shape, seed=0, scale=0.02):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def dense(fit, function=silu):
    a, b, alpha, mean = (np.asarray(x, np.float64) for x in (fit.coefficients, fit.bases, fit.mixing, fit.mean))
    return a @ function(np.einsum("em,mrq->erq", alpha, b)) + mean


def total_error(fit, weight, function=silu):
    return np.linalg.norm(dense(fit, function) - weight) / np.linalg.norm(weight)


def grouped_svd_error(weight, bases, rank):
    """Relative error if every block of experts had one linear basis of its own: the energy beyond its rank."""
    blocks = owners(len(weight), bases)
    lost = 0.0
    for block in range(bases):
        stacked = weight[blocks == block].reshape(-1, weight.shape[2]).astype(np.float64)
        lost += np.sum(np.linalg.svd(stacked, compute_uv=False)[rank:] ** 2)
    return np.sqrt(lost / np.sum(weight.astype(np.float64) ** 2))


def oracle(target, a, b, logits, *, steps, rate=0.07, moment=None):
    """The published algorithm in float64, loops over experts and bases: losses, and parameters before the last step."""
    parameters = [x.astype(np.float64) for x in (a, b, logits)]
    first = [np.zeros_like(x) for x in parameters]
    second = [np.zeros_like(x) for x in parameters]
    moment = np.eye(target.shape[2]) if moment is None else moment
    losses = []
    for step in range(1, steps + 1):
        a, b, logits = before = [x.copy() for x in parameters]
        alpha = softmax(logits)
        d_a, d_b, d_alpha = np.zeros_like(a), np.zeros_like(b), np.zeros_like(alpha)
        lost = whole = 0.0
        for e in range(len(target)):
            h = sum(alpha[e, j] * b[j] for j in range(len(b)))
            s = 1 / (1 + np.exp(-h))
            residual = a[e] @ (h * s) - target[e]
            lost += np.trace(residual @ moment @ residual.T)
            whole += np.trace(target[e] @ moment @ target[e].T)
            pulled = 2 * residual @ moment / target.size
            d_a[e] = pulled @ (h * s).T
            d_h = (a[e].T @ pulled) * (s + h * s * (1 - s))
            for j in range(len(b)):
                d_b[j] += alpha[e, j] * d_h
                d_alpha[e, j] = np.sum(b[j] * d_h)
        losses.append(lost / whole)
        d_logits = alpha * (d_alpha - np.sum(alpha * d_alpha, axis=1, keepdims=True))
        for i, gradient in enumerate((d_a, d_b, d_logits)):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            corrected = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            parameters[i] = before[i] - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    return np.array(losses), before


@pytest.mark.parametrize("weighted", [False, True])
def test_steps_equal_the_oracle(weighted):
    weight = gaussian(E, P, Q)
    inputs = np.random.default_rng(3).normal(size=(50, Q)) * np.geomspace(2, 0.1, Q)
    moment = inputs.T @ inputs / 50 if weighted else None
    fit = partial(
        learn_basis, weight, bases=M, rank=R, moment=moment if moment is None else moment[None], patience=None
    )
    start, after = fit(steps=1), fit(steps=5)  # One step returns the start: it is evaluated, then left.
    sigma = weight.astype(np.float64).std()
    logits = np.eye(M)[owners(E, M)]
    np.testing.assert_allclose(start.mixing, softmax(logits), atol=1e-7)
    losses, (a, b, logits) = oracle(
        weight / sigma, np.asarray(start.coefficients) / sigma, np.asarray(start.bases), logits, steps=5, moment=moment
    )
    np.testing.assert_allclose(after.losses, losses, rtol=2e-4)
    assert np.argmin(losses) == 4
    np.testing.assert_allclose(np.asarray(after.coefficients) / sigma, a, atol=2e-3)
    np.testing.assert_allclose(after.bases, b, atol=2e-3)
    np.testing.assert_allclose(after.mixing, softmax(logits), atol=1e-3)


def test_start_is_the_svd_of_blocks_of_raw_weights():
    weight = gaussian(E, P, Q)
    fit = learn_basis(weight, bases=M, rank=R, steps=0)
    sigma = weight.astype(np.float64).std()
    for block in range(M):
        members = np.flatnonzero(owners(E, M) == block)
        u, s, vt = np.linalg.svd(weight[members].reshape(-1, Q).astype(np.float64), full_matrices=False)
        best = ((u[:, :R] * s[:R]) @ vt[:R]).reshape(-1, P, Q)
        # Coefficients are of raw weights, then scaled back by sigma with everything else.
        linear = np.asarray(fit.coefficients)[members] / sigma @ np.asarray(fit.bases)[block]
        np.testing.assert_allclose(linear, best, atol=1e-6)
    assert total_error(fit, weight) > 0.99
    assert int(fit.steps) == 0
    assert fit.losses.shape == (0,)


def test_known_errors_on_gaussian_weights():
    """The table of measured hints for 200 steps; the whole table is the slow test below."""
    weight = gaussian(32, 96, 256)
    assert grouped_svd_error(weight, 8, 96) == pytest.approx(0.534, abs=0.01)
    fit = learn_basis(weight, bases=8, rank=96, steps=200)
    assert np.sqrt(np.min(fit.losses)) == pytest.approx(0.399, abs=0.01)
    assert np.sqrt(fit.losses[0]) == pytest.approx(0.997, abs=0.003)


@pytest.mark.slow
def test_known_errors_on_gaussian_weights_in_full():
    weight = gaussian(32, 96, 256)
    table = {
        "identity": (0.409, 0.388, 0.378, 0.376),
        "tanh": (0.406, 0.375, 0.358, 0.352),
        "silu": (0.399, 0.359, 0.344, 0.338),
    }
    at_1000 = {}
    for activation, expected in table.items():
        losses = np.asarray(learn_basis(weight, bases=8, rank=96, activation=activation, steps=1500).losses)
        errors = [np.sqrt(losses[:steps].min()) for steps in (200, 500, 1000, 1500)]
        np.testing.assert_allclose(errors, expected, atol=0.01, err_msg=activation)
        at_1000[activation] = errors[2]
    for activation in ("gelu", "relu", "sigmoid"):
        losses = learn_basis(weight, bases=8, rank=96, activation=activation, steps=1000).losses
        at_1000[activation] = float(np.sqrt(np.nanmin(losses)))
    assert at_1000["gelu"] == pytest.approx(at_1000["silu"], abs=0.01)
    ordered = [at_1000[name] for name in ("silu", "tanh", "identity", "relu", "sigmoid")]
    assert ordered == sorted(ordered)


def test_more_bases_or_ranks_fit_better():
    weight = gaussian(8, 12, 32)
    sizes = ((4, 12), (2, 12), (2, 6))
    errors = [total_error(learn_basis(weight, bases=m, rank=r, steps=400), weight) for m, r in sizes]
    assert errors == sorted(errors)
    for (bases, rank), error in zip(sizes, errors):
        assert error < grouped_svd_error(weight, bases, rank)


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_without_mixing_it_is_the_svd_of_every_group(activation):
    weight = gaussian(6, 8, 24)
    best = grouped_svd_error(weight, 3, 6)
    fit = learn_basis(
        weight, bases=3, groups=3, rank=6, activation=activation, steps=3000, learning_rate=0.01, patience=None
    )
    np.testing.assert_allclose(fit.mixing, np.eye(3)[owners(6, 3)])
    error = total_error(fit, weight, silu if activation == "silu" else lambda x: x)
    assert best * (1 - 1e-5) <= error < best * 1.02


def test_groups_are_separate_problems():
    weight = gaussian(7, 6, 16)
    # One scale for all: the halves must not be normalised apart.
    options = {"rank": 4, "steps": 30, "normalize": "none", "start_scale": 0.02, "learning_rate": 1e-3}
    joint = learn_basis(weight, bases=4, groups=2, **options)
    blocks = owners(7, 2)
    for group in range(2):
        alone = learn_basis(weight[blocks == group], bases=2, **options)
        np.testing.assert_allclose(joint.coefficients[blocks == group], alone.coefficients, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(joint.bases[2 * group : 2 * group + 2], alone.bases, rtol=1e-5, atol=1e-7)
        other = joint.mixing[blocks == group][:, [2, 3] if group == 0 else [0, 1]]
        assert not np.any(other)
    assert total_error(joint, weight) ** 2 == pytest.approx(float(np.min(joint.losses)), rel=1e-4)


def test_power_of_two_scales_the_result_exactly():
    weight = gaussian(4, 8, 16)
    fit = partial(learn_basis, bases=2, rank=8, steps=300, start_scale=0.02)
    plain, scaled = fit(weight), fit(weight * 8)
    np.testing.assert_array_equal(scaled.coefficients, plain.coefficients * 8)
    np.testing.assert_array_equal(scaled.bases, plain.bases)
    np.testing.assert_array_equal(scaled.mixing, plain.mixing)
    np.testing.assert_array_equal(scaled.losses, plain.losses)


def test_permuted_blocks_give_permuted_results():
    weight = gaussian(6, 8, 16)
    order = np.array([4, 5, 0, 1, 2, 3])
    fit = partial(learn_basis, bases=3, rank=8, steps=20)
    plain, moved = fit(weight), fit(weight[order])
    np.testing.assert_allclose(dense(moved), dense(plain)[order], atol=2e-4)


def test_best_parameters_belong_to_the_best_loss_and_patience_ends_the_fit():
    weight = gaussian(4, 8, 16)
    # So long a step overshoots at once: the best loss is the first.
    fit = learn_basis(weight, bases=2, rank=8, steps=300, learning_rate=30.0, patience=5)
    steps, losses = int(fit.steps), np.asarray(fit.losses)
    assert steps < 300
    assert np.isnan(losses[steps:]).all()
    assert losses[:steps].argmin() == steps - 6
    assert not bool(fit.diverged)
    assert total_error(fit, weight) ** 2 == pytest.approx(losses[:steps].min(), rel=1e-3)
    lost = np.linalg.norm(dense(fit) - weight, axis=(1, 2)) / np.linalg.norm(weight, axis=(1, 2))
    np.testing.assert_allclose(fit.error, lost, rtol=1e-3)


def test_uneven_blocks_fit_every_expert():
    fit = learn_basis(gaussian(7, 8, 24), bases=3, rank=8, steps=300)
    assert np.max(fit.error) < 0.5


def test_constants_are_exact():
    assert not np.any(dense(learn_basis(np.zeros((4, 3, 8), np.float32), bases=2, rank=2, steps=5)))
    level = np.full((4, 3, 8), 0.1, np.float32)
    for normalize in ("std", "zscore"):
        fit = learn_basis(level, bases=2, rank=2, steps=5, normalize=normalize)
        np.testing.assert_allclose(dense(fit), level, rtol=1e-6)


def test_zscore_keeps_a_mean_that_std_must_learn():
    weight = gaussian(4, 8, 16) + np.float32(0.1)
    fit = learn_basis(weight, bases=2, rank=8, steps=200, normalize="zscore")
    assert float(fit.mean) == pytest.approx(0.1, abs=0.005)
    centred = weight - weight.mean()
    assert np.linalg.norm(dense(fit) - weight) < 0.6 * np.linalg.norm(centred)


def test_free_mixing_from_random_numbers_fits():
    weight = gaussian(8, 12, 32)
    bound = grouped_svd_error(weight, 4, 12)
    fit = learn_basis(weight, bases=4, rank=12, steps=400, mixing="free", initial="random")
    assert total_error(fit, weight) < bound
    assert np.min(fit.mixing) < 0


def test_expert_weights_trade_errors():
    weight = gaussian(6, 8, 24)
    favour = np.array([10, 1, 1, 1, 1, 1], np.float32)
    plain = learn_basis(weight, bases=2, rank=6, steps=500)
    bent = learn_basis(weight, bases=2, rank=6, steps=500, expert_weight=favour)
    assert bent.error[0] < 0.9 * plain.error[0]


def test_final_resolve_lowers_the_error_under_a_moment():
    weight = gaussian(6, 8, 24)
    inputs = np.random.default_rng(1).normal(size=(100, 24)) * np.geomspace(3, 0.1, 24)
    moment = inputs.T @ inputs / 100
    root = np.linalg.cholesky(moment)

    def weighted(fit):
        return np.linalg.norm((dense(fit) - weight) @ root) / np.linalg.norm(weight @ root)

    options = {"bases": 2, "rank": 6, "steps": 300}
    blind, aware = learn_basis(weight, **options), learn_basis(weight, moment=moment[None], **options)
    solved = learn_basis(weight, moment=moment[None], resolve=True, **options)
    assert weighted(aware) < 0.8 * weighted(blind)
    assert weighted(solved) <= weighted(aware) * (1 + 1e-4)


def test_broken_numbers_are_flagged():
    weight = gaussian(4, 8, 16)
    weight[2, 3, 4] = np.nan
    fit = learn_basis(weight, bases=2, rank=4, steps=10)
    assert bool(fit.diverged)
    assert int(fit.steps) == 1
    assert bool(learn_basis(gaussian(4, 8, 16), bases=2, rank=4, steps=50, learning_rate=1e20).diverged)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bases": 9, "rank": 4}, "9 bases for 6 experts"),
        ({"bases": 2, "rank": 7}, "rank 7 for matrices of 5 x 12"),
        ({"bases": 0, "rank": 0}, "0 bases.*rank 0"),
        ({"bases": 2, "rank": 2, "activation": "cube"}, "unknown activation 'cube'"),
        ({"bases": 2, "rank": 2, "mixing": "hard"}, "unknown mixing 'hard'"),
        ({"bases": 3, "rank": 2, "groups": 2}, "2 groups.*3 bases"),
    ],
)
def test_impossible_requests_are_refused(options, words):
    with pytest.raises(JaxmoeError, match=words):
        learn_basis(jnp.ones((E, P, Q)), **options)
