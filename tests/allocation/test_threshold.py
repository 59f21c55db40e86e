"""Ranks from one threshold: against a bisection with the published rule, and the promise to spend the budget."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.allocation import ranks_by_threshold
from jaxmoe.errors import JaxmoeError


@st.composite
def problems(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6))
    value = st.integers(0, 40) if draw(st.booleans()) else st.floats(0, 1e6)
    spectra = [sorted((float(draw(value)) for _ in range(min(shape))), reverse=True) for shape in shapes]
    least, most = sum(stored(1, shape) for shape in shapes), sum(m * n for m, n in shapes)
    return spectra, shapes, draw(st.integers(least, most + 3))


def stored(rank, shape):
    m, n = shape
    return min(m * n, rank * (m + n))


def normalized(spectrum):
    s = np.array(spectrum)
    return np.ones_like(s) if s[0] == s[-1] else (s - s[-1]) / (s[0] - s[-1])


def at(threshold, spectra, shapes):
    """The published rule with the gate: at least rank one, dense where factors would not save."""
    ranks = []
    for spectrum, (m, n) in zip(spectra, shapes, strict=True):
        rank = max(1, int(np.sum(normalized(spectrum) >= threshold)))
        ranks.append(min(m, n) if rank * (m + n) >= m * n else rank)
    return np.array(ranks)


def total(ranks, shapes):
    return sum(stored(rank, shape) for rank, shape in zip(ranks, shapes, strict=True))


@settings(max_examples=400, deadline=None)
@given(problems())
def test_the_budget_is_spent(problem):
    _, shapes, budget = problem
    ranks, _ = ranks_by_threshold(*problem)
    left = budget - total(ranks, shapes)
    assert left >= 0
    for rank, (m, n) in zip(ranks, shapes, strict=True):
        assert 1 <= rank <= min(m, n)
        dense = rank == min(m, n)
        assert dense or rank * (m + n) < m * n, "a factored rank saves"
        assert dense or stored(rank + 1, (m, n)) - stored(rank, (m, n)) > left


@settings(max_examples=400, deadline=None)
@given(problems())
def test_lies_between_the_published_rule_just_above_and_at_the_threshold(problem):
    """All above the threshold is kept; what it still says is too dear."""
    spectra, shapes, budget = problem
    ranks, threshold = ranks_by_threshold(*problem)
    if threshold == 0.0 and total(ranks, shapes) == sum(m * n for m, n in shapes):
        return
    above = at(np.nextafter(threshold, 2), spectra, shapes)
    if threshold < 1:
        assert np.all(ranks >= above)
        assert total(above, shapes) <= budget
    assert total(at(threshold, spectra, shapes), shapes) > budget


def test_equals_a_bisection_without_ties():
    rng = np.random.default_rng(0)
    shapes = [(24, 40), (40, 24), (32, 32), (16, 64)] * 3
    spectra = [-np.sort(-rng.pareto(0.5 + i / 4, size=min(shape))) for i, shape in enumerate(shapes)]
    budget = sum(m * n for m, n in shapes) // 2
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if total(at(middle, spectra, shapes), shapes) <= budget:
            high = middle
        else:
            low = middle
    expected = at(high, spectra, shapes)
    ranks, threshold = ranks_by_threshold(spectra, shapes, budget)
    assert threshold == pytest.approx(high, abs=1e-12)
    assert np.all(ranks >= expected)
    assert total(ranks, shapes) - total(expected, shapes) < max(m + n for m, n in shapes)


def test_flat_spectra_stay_and_steep_ones_are_cut():
    steep, flat = np.geomspace(1, 1e-4, 32), np.append(np.linspace(1, 0.9, 31), 0)
    ranks, _ = ranks_by_threshold([steep, flat], [(32, 32), (32, 32)], 32 * 32 + 64)
    assert ranks.tolist() == [1, 32]


def test_equal_values_stay_dense_while_the_budget_reaches():
    even, other = np.full(8, 3.0), np.linspace(4, 1, 8)
    assert ranks_by_threshold([other, even], [(8, 8), (8, 8)], 64 + 16)[0].tolist() == [1, 8]
    assert ranks_by_threshold([other, even], [(8, 8), (8, 8)], 48)[0].tolist() == [1, 2]


def test_the_scale_of_a_matrix_does_not_matter():
    rng = np.random.default_rng(1)
    spectra = -np.sort(-rng.pareto(1.0, size=(5, 16)), axis=1)
    scales = 2.0 ** np.array([[0], [3], [-9], [40], [1]])
    shapes = [(16, 30)] * 5
    np.testing.assert_array_equal(
        ranks_by_threshold(spectra, shapes, 1200)[0], ranks_by_threshold(spectra * scales, shapes, 1200)[0]
    )


def test_a_row_is_dense():
    assert ranks_by_threshold([[2.0]], [(1, 9)], 9)[0].tolist() == [1]
    with pytest.raises(JaxmoeError, match="the least is 9"):
        ranks_by_threshold([[2.0]], [(1, 9)], 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[2.0, 1.0]], [(2, 3), (2, 3)], 9), "1 spectra with 2 shapes"),
        (([[2.0, 1.0]], [(3, 3)], 9), r"2 values of \(3, 3\)"),
        (([[1.0, 2.0]], [(2, 3)], 9), "descending"),
        (([[2.0, 1.0]], [(2, 3)], 4), "a budget of 4 numbers is out of reach: the least is 5"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(JaxmoeError, match=message):
        ranks_by_threshold(*arguments)
