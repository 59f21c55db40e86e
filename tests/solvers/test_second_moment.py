"""Second moments as solvers take them: against the published shrinkage, and what they promise at the edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.errors import JaxmoeError
from jaxmoe.solvers.second_moment import check_moment, expert_moments, starved

E, N = 4, 6
COUNTS = np.array([200, 40, 3, 0])


def sums(counts=COUNTS, seed=0):
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=(count, N)) * np.geomspace(2, 0.1, N) for count in counts]
    return np.stack([x.T @ x for x in inputs])


def test_equals_the_published_shrinkage_times_the_tokens():
    found = expert_moments(sums(), COUNTS, prior=4.0, floor=0.0)
    pooled = sums().sum(0) / COUNTS.sum()
    expected = []
    for own, count in zip(sums(), COUNTS, strict=True):
        beta = 4 * N / (4 * N + count)
        mean = own / count if count else np.zeros((N, N))
        expected.append((count + 4 * N) * ((1 - beta) * mean + beta * pooled))
    expected = np.stack(expected)
    scale = np.mean([np.trace(c) / N for c in expected])
    np.testing.assert_allclose(found, expected / scale, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found[3] / np.trace(found[3]), pooled / np.trace(pooled), rtol=1e-12, atol=1e-14)


@given(st.integers(0, 99), st.floats(0.01, 1.0), st.floats(1e-6, 1e6))
def test_no_direction_is_below_the_floor_and_units_do_not_matter(seed, floor, unit):
    found = expert_moments(sums(seed=seed), COUNTS, floor=floor)
    levels = np.trace(found, axis1=1, axis2=2) / N
    assert np.mean(levels) == pytest.approx(1)
    assert np.all(np.linalg.eigvalsh(found)[:, 0] >= 0.999 * floor / (1 + floor) * levels)
    np.testing.assert_allclose(
        expert_moments(unit * sums(seed=seed), COUNTS, floor=floor), found, rtol=1e-9, atol=1e-12
    )


def test_more_tokens_have_more_say():
    levels = np.trace(expert_moments(sums(), COUNTS), axis1=1, axis2=2)
    assert np.all(np.diff(levels) < 0)
    assert starved(COUNTS, N) == (2, 3)


def test_inputs_that_were_zero_weigh_all_directions_alike():
    np.testing.assert_array_equal(expert_moments(np.zeros((E, N, N)), COUNTS), np.tile(np.eye(N), (E, 1, 1)))


@pytest.mark.parametrize(
    ("given_sums", "counts", "message"),
    [
        (np.ones((E, N)), COUNTS, "side, side"),
        (np.ones((E, N, N)), COUNTS[1:], r"counts \(3,\)"),
        (np.full((E, N, N), np.nan), COUNTS, "not finite"),
        (np.ones((E, N, N)), 0 * COUNTS, "more text"),
    ],
)
def test_what_is_no_moment_is_refused(given_sums, counts, message):
    with pytest.raises(JaxmoeError, match=message):
        expert_moments(given_sums, counts)


def test_one_shape_convention():
    for shape in ((1, N, N), (E, N, N)):
        check_moment("moment", np.ones(shape), E, N)
    check_moment("moment", np.ones((E, N)), E, N, diagonal=True)
    for shape in ((N, N), (E, N), (2, N, N), (N,)):
        with pytest.raises(JaxmoeError, match="moment has shape"):
            check_moment("moment", np.ones(shape), E, N)
