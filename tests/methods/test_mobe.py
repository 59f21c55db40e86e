"""MoBE against numpy in float64: the published formula and sizes, the coefficients, and the errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from crossing import crossed
from small_fits import SHAPE, WEIGHTS, fitted, materialized, moments, relative

from jaxmoe import methods
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape, LowRank, SharedBasis
from jaxmoe.methods import Evidence
from jaxmoe.methods.mobe import MoBESettings

MOBE = methods.get("mobe")
FUNCTIONS = {"silu": lambda x: x / (1 + np.exp(-x)), "wavelet": lambda x: x * (1 - x**2) / (1 + x**2) ** 3}


def features(term):
    """Return f(sum_j alpha_ej B_j) of a stored term, in float64."""
    mixing, bases = (np.asarray(array, np.float64) for array in (term.mixing, term.bases))
    return FUNCTIONS[term.activation](np.einsum("ej,jrc->erc", mixing, bases))


@pytest.mark.parametrize(("setting", "target"), [("paper", "gate"), ("improved", "gate_up"), ("improved", "down")])
def test_stored_mixtures_are_the_published_formula(setting, target):
    size = {"paper": {"level": 3}, "improved": {"level": 8, "bases": 2}}[setting]
    result, weight = fitted("mobe", target, steps=60, setting=setting, **size)
    (term,) = result.terms
    assert term.activation == ("silu" if setting == "paper" else "wavelet")
    product = np.asarray(term.coefficients, np.float64) @ features(term)
    assert term.transposed == (weight.shape[1] > weight.shape[2])
    expected = np.swapaxes(product, 1, 2) if term.transposed else product
    np.testing.assert_allclose(materialized(result), expected, atol=1e-6)
    if setting == "paper":
        # Coefficients of a softmax, and square ones: r = P.
        np.testing.assert_allclose(np.asarray(term.mixing).sum(1), 1, rtol=1e-5)
        assert term.coefficients.shape == (6, 20, 20)
    assert result.losses[-1] < result.losses[0]
    assert np.nanmin(result.losses) == pytest.approx(relative(result, weight) ** 2, rel=0.05)


@pytest.mark.parametrize(("hidden", "dtype"), [(48, "float32"), (48, ml_dtypes.bfloat16), (32, ml_dtypes.bfloat16)])
def test_coefficients_are_the_least_squares_ones_for_the_bases_as_stored(hidden, dtype):
    """Normal equations (W - A F) C F' = 0; of a transposed fit the moment lies along the rows and decides nothing."""
    shape, chosen = LayerShape(experts=6, hidden=hidden, intermediate=20), MoBESettings(steps=40, bases=2)
    weight = 0.02 * np.random.default_rng(1).normal(size=shape.of("gate_up"))
    _, moment = moments(hidden, shared=False, weakest=0.5)
    template = MOBE.slot("gate_up", shape, np.dtype(dtype), chosen, 0.5).at(5)
    evidence = Evidence(target="gate_up", moment=jnp.asarray(moment, jnp.float32))
    fit = MOBE.fit(jnp.asarray(weight, jnp.float32), template, chosen, evidence=evidence, key=jax.random.key(0))
    (term,) = fit.terms
    assert term.transposed == (hidden == 32)
    if term.transposed:
        weight, moment = np.swapaxes(weight, 1, 2), np.eye(40)[None]
    kept = features(term)
    weighted = moment @ np.swapaxes(kept, 1, 2)
    expected = np.swapaxes(np.linalg.solve(kept @ weighted, np.swapaxes(weight @ weighted, 1, 2)), 1, 2)
    difference = np.asarray(term.coefficients, np.float64) - expected
    # What is left over is the rounding of the coefficients themselves.
    assert np.linalg.norm(difference) < (1e-4 if dtype == "float32" else 3e-3) * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("settings", "target", "level", "numbers"),
    [
        # Square coefficients [20, 20] for gate and up, and the level is the number of bases.
        ({"setting": "paper"}, "gate", 3, 6 * 20 * 20 + 3 * 20 * 32 + 6 * 3),
        ({"setting": "paper", "rank": 8}, "up", 3, 6 * 20 * 8 + 3 * 8 * 32 + 6 * 3),
        ({"setting": "paper", "bases": 2}, "up", 9, 6 * 20 * 9 + 2 * 9 * 32 + 6 * 2),
        # Bases lie along the longer axis: 40 for gate and up together, 32 for down.
        ({"bases": 2}, "gate_up", 9, 6 * 32 * 9 + 2 * 9 * 40 + 6 * 2),
        ({"bases": 2}, "down", 9, 6 * 20 * 9 + 2 * 9 * 32 + 6 * 2),
    ],
)
def test_stored_numbers_are_those_of_the_publication(settings, target, level, numbers):
    result, _ = fitted("mobe", target, level=level, steps=0, **settings)
    (term,) = result.terms
    assert term.count().numbers == numbers == sum(array.size for array in term.tensors().values())
    assert [outcome.kind for outcome in result.outcomes] == ["not_fitted"]


def test_what_each_setting_replaces():
    assert list(MOBE.targets(SHAPE, MoBESettings(setting="paper"))) == ["gate", "up"]
    assert list(MOBE.targets(SHAPE, MoBESettings())) == ["gate_up", "down"]


@pytest.mark.parametrize("settings", [{"setting": "paper"}, {"rank": 5}, {"bases": 2}, {}])
def test_the_highest_level_is_the_last_that_saves(settings):
    chosen = MoBESettings(**settings)
    for target in MOBE.targets(SHAPE, chosen):
        slot = MOBE.slot(target, SHAPE, np.dtype("float32"), chosen, 0.6)
        ladder = slot.ladder()
        assert ladder.numbers(slot.high) == sum(term.count().numbers for term in slot.at(slot.high)) < ladder.dense
        (term,) = slot.at(slot.high)
        full = term.bases.shape[0] == SHAPE.experts or term.rank == min(SHAPE.of(target)[1:])
        assert full or ladder.numbers(slot.high) + ladder.step >= ladder.dense


@pytest.mark.parametrize(("target", "shared"), crossed(["gate_up", "down"], [True, False]))
def test_weighted_by_inputs_serves_those_inputs(target, shared):
    rng = np.random.default_rng(2)
    size = SHAPE.of(target)[2]
    inputs = rng.normal(size=(1 if shared else 6, 2000, size)) * np.geomspace(2, 0.05, size)
    moment = jnp.asarray(np.einsum("eti,etj->eij", inputs, inputs) / 2000, jnp.float32)
    plain, weight = fitted("mobe", target, level=8, steps=400, bases=2)
    aware, _ = fitted("mobe", target, level=8, steps=400, bases=2, moment=moment)

    def output_error(result):
        difference = materialized(result) - weight
        return np.linalg.norm(np.einsum("eti,eoi->eto", np.broadcast_to(inputs, (6, 2000, size)), difference))

    # A transposed fit has the inputs along its rows, each served by coefficients of its own: only the bases move.
    assert output_error(aware) < 0.95 * output_error(plain)


@pytest.mark.parametrize(("setting", "target"), [("paper", "gate"), ("improved", "gate_up"), ("improved", "down")])
def test_beats_svd_of_equal_size(setting, target):
    options = {"improved": {"steps": 400, "bases": 2}, "paper": {"steps": 800}}[setting] | {"setting": setting}
    ladder = MOBE.slot(target, SHAPE, np.dtype("float32"), MoBESettings(**options), 0.6).ladder()
    level = ladder.floor(0.6 * ladder.dense)
    result, weight = fitted("mobe", target, level=level, **options)
    (term,) = result.terms
    assert isinstance(term, SharedBasis)
    rank = term.count().numbers // LowRank.abstract(weight.shape, "float32", rank=1).count().numbers
    tail = np.linalg.svd(weight.astype(np.float64), compute_uv=False)[:, rank:]
    assert relative(result, weight) < np.linalg.norm(tail) / np.linalg.norm(weight)
    assert np.nanmin(result.losses) == pytest.approx(relative(result, weight) ** 2, rel=0.05)


def test_stored_coefficients_absorb_the_rounding_of_the_bases():
    """In bfloat16 the improved fit loses less than the float32 fit whose every part is rounded afterwards."""
    full, weight = fitted("mobe", "down", level=20, steps=300, bases=2)
    half, _ = fitted("mobe", "down", level=20, steps=300, bases=2, dtype=ml_dtypes.bfloat16)
    rounded = full._replace(terms=jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), full.terms))
    assert {x.dtype for x in jax.tree.leaves(half.terms)} == {np.dtype(ml_dtypes.bfloat16)}
    lost = relative(half, weight) ** 2 - relative(full, weight) ** 2
    assert lost < 0.9 * (relative(rounded, weight) ** 2 - relative(full, weight) ** 2)


def test_as_many_bases_as_experts_hold_everything():
    """A = I / s and B_e = f^-1(s W_e) with one base of its own for every expert: nothing is lost."""
    scale = 0.5 / np.abs(WEIGHTS["gate"]).max()
    term = SharedBasis(
        coefficients=jnp.broadcast_to(jnp.eye(20) / scale, (6, 20, 20)),
        bases=jnp.arctanh(scale * WEIGHTS["gate"]),
        mixing=jnp.eye(6),
        activation="tanh",
    )
    np.testing.assert_allclose(term.materialize(), WEIGHTS["gate"], atol=1e-6)


def test_zeros_stay_zeros():
    nothing = {name: np.zeros_like(weight) for name, weight in WEIGHTS.items()}
    result, _ = fitted("mobe", "down", nothing, level=12, steps=20)
    assert not materialized(result).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bases": 7}, "7 bases for 6 experts: give 1 to 6"),
        ({"rank": 21}, "rank 21: the matrices of down are 32 x 20; give 1 to 20"),
    ],
)
def test_sizes_that_the_matrices_do_not_have_are_named(settings, words):
    with pytest.raises(JaxmoeError, match=words):
        MOBE.slot("down", SHAPE, np.dtype("float32"), MoBESettings(**settings), 0.5)


@pytest.mark.parametrize(
    "wrong", [{"setting": "best"}, {"activation": "sine"}, {"steps": -1}, {"bases": 0}, {"rank": 0}, {"patience": 0}]
)
def test_wrong_settings_are_named(wrong):
    (value,) = wrong.values()
    with pytest.raises(JaxmoeError, match=str(value)):
        MoBESettings(**wrong)


def test_bases_and_rank_together_are_refused():
    with pytest.raises(JaxmoeError, match="bases=2, rank=3: give one of them"):
        MoBESettings(bases=2, rank=3)
