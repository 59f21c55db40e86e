"""What slots keep: odds by weight, by what their removal costs, by one water level over their spectra."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.allocation import by_energy, by_loss, by_odds, share, water_fill
from jaxmoe.errors import JaxmoeError

levels = st.floats(0, 1)
slots = st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1e3)), min_size=1, max_size=6)


@st.composite
def spectra(draw):
    return [
        sorted(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 7.0]), min_size=1, max_size=6)), reverse=True)
        for _ in range(draw(st.integers(1, 4)))
    ]


def level_at(rule, sizes, kept):
    """The level at which slots keep that fraction of all their numbers, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.dot(rule(middle), sizes) <= kept * np.sum(sizes) else (low, middle)
    return low


@pytest.mark.parametrize("removed", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_by_loss_is_near_the_optimum_where_little_is_removed(seed, removed):
    """sum loss rho^2 at equal numbers is least at rho_s ~ size_s / loss_s, and the rule goes there as rho goes to 0."""
    rng = np.random.default_rng(seed)
    sizes, losses = rng.integers(50, 400, 5).astype(float), rng.uniform(1, 5, 5)
    ideal = sizes / losses
    ideal *= removed * sizes.sum() / (ideal @ sizes)
    best, even = losses @ ideal**2, losses.sum() * removed**2
    moves = rng.normal(size=(200, 5))
    moves -= np.outer(moves @ sizes / (sizes @ sizes), sizes)
    assert (np.square(ideal + 0.1 * removed * moves) @ losses > best).all(), "the oracle is not the optimum"

    rule = by_loss(sizes, losses)
    found = 1 - np.array(rule(level_at(rule, sizes, 1 - removed)))
    assert found @ sizes == pytest.approx(removed * sizes.sum(), rel=1e-6)
    assert best <= losses @ found**2 * (1 + 1e-6)
    assert losses @ found**2 <= best * (1 + removed)
    assert losses @ found**2 < even
    np.testing.assert_allclose(found, ideal, rtol=10 * removed)


def test_by_loss_looks_at_loss_per_number_in_any_unit():
    rule = by_loss([10, 20, 10], [1.0, 2.0, 4.0])
    low, wide, dear = rule(0.8)
    assert low == pytest.approx(wide)
    assert dear > low
    np.testing.assert_allclose(by_loss([10, 20, 10], [1e9, 2e9, 4e9])(0.8), rule(0.8))
    np.testing.assert_allclose(by_loss([3, 7], [0.0, 0.0])(0.4), by_odds([1.0, 1.0])(0.4))
    free, dear = by_loss([5, 5], [0.0, 1.0])(0.9)
    assert 0 < free < 0.9 < dear < 1


@settings(max_examples=200, deadline=None)
@given(slots, levels, levels)
def test_fractions_rise_with_the_level_and_stay_fractions(given_slots, one, other):
    sizes, losses = zip(*given_slots)
    low, high = sorted((one, other))
    for rule in (by_loss(sizes, losses), by_odds([1 + loss for loss in losses])):
        less, more = np.array(rule(low)), np.array(rule(high))
        assert ((less >= 0) & (more <= 1 + 1e-12)).all()
        assert (less <= more + 1e-12).all()
        np.testing.assert_allclose(rule(1.0), 1.0)
        np.testing.assert_allclose(rule(0.0), 0.0)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0.1, 50))
def test_a_weight_multiplies_the_odds_in_full_where_all_is_kept(fraction, weight):
    kept = share(fraction, weight)
    assert share(fraction, 1.0) == pytest.approx(fraction)
    assert (kept >= fraction) == (weight >= 1) or kept == pytest.approx(fraction)
    near = share(1 - 1e-6, weight)
    assert (near / (1 - near)) / ((1 - 1e-6) / 1e-6) == pytest.approx(weight, rel=1e-3)


@settings(max_examples=200, deadline=None)
@given(spectra(), st.integers(0, 24))
def test_by_energy_is_the_water_level_for_slots_of_one_unit(energies, budget):
    """With ranks of one number each, a level keeps exactly what water filling takes at that budget."""
    lengths = [len(own) for own in energies]
    budget = min(budget, sum(lengths))
    ranks, _ = water_fill(energies, 1, budget)
    found = by_energy(energies, [1] * len(energies), lengths)((budget + 0.5) / sum(lengths))
    np.testing.assert_allclose(np.array(found) * lengths, ranks)


@settings(max_examples=200, deadline=None)
@given(spectra(), st.data(), levels, levels)
def test_by_energy_rises_and_cuts_at_one_height(energies, data, one, other):
    costs = [data.draw(st.integers(1, 9)) for _ in energies]
    sizes = [len(own) * cost + data.draw(st.integers(0, 5)) for own, cost in zip(energies, costs)]
    rule = by_energy(energies, costs, sizes)
    low, high = sorted((one, other))
    less, more = np.array(rule(low)), np.array(rule(high))
    assert (less <= more).all()
    assert ((less >= 0) & (more <= 1)).all()
    ranks = np.round(less * sizes / costs).astype(int)
    assert np.dot(ranks, costs) <= low * sum(len(own) * cost for own, cost in zip(energies, costs)) + 1e-6
    taken = [own[rank - 1] / cost for own, cost, rank in zip(energies, costs, ranks) if rank]
    left = [own[rank] / cost for own, cost, rank in zip(energies, costs, ranks) if rank < len(own)]
    assert not taken or not left or min(taken) >= max(left) - 1e-12


def test_by_energy_without_slots_and_beyond_their_size():
    assert by_energy([], [], [])(0.5) == []
    # More ranks than a slot has room for count as all of it.
    assert by_energy([[3.0, 2.0, 1.0]], [4], [8])(1.0) == [1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: by_loss([1, 2], [1.0, -2.0]), "losses: -2.0 of unit 1"),
        (lambda: by_loss([1, float("inf")], [1.0, 2.0]), "sizes: inf of unit 1"),
        (lambda: by_loss([1, 2], [float("nan"), 2.0]), "losses: nan of unit 0"),
        (lambda: by_energy([[1.0, 2.0]], [1], [2]), "descending"),
        (lambda: by_energy([[1.0]], [-1], [2]), "costs: -1.0 of unit 0"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(JaxmoeError, match=message):
        call()
