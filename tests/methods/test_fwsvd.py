"""FWSVD: the published example, an oracle in float64, starved experts, and what it takes from calibration."""

import jax
import numpy as np
import pytest
from small_fits import SHAPE, WEIGHTS, fitted, materialized, moments

from jaxmoe import methods
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Grouped, LayerShape, LowRank
from jaxmoe.methods import Evidence

FWSVD = methods.get("fwsvd")
RNG = np.random.default_rng(3)


def published(weight, fisher, rank):
    """Return a paper fit of some matrices `[expert, out, in]`."""
    shape = LayerShape(experts=len(weight), hidden=weight.shape[1], intermediate=weight.shape[2])
    settings = FWSVD.settings(setting="paper")
    evidence = Evidence(target="down", statistic={"fisher_down": fisher}.get)
    template = FWSVD.slot("down", shape, np.dtype("float32"), settings, 0.5).at(rank)
    return FWSVD.fit(weight.astype(np.float32), template, settings, evidence=evidence, key=jax.random.key(0))


def test_the_worked_example():
    weight = np.array([[[2.0, 1, 0], [1, 3, 1]]])
    fisher = np.array([[[4.0, 1, 1], [9, 1, 0]]])
    fit = published(weight, fisher, 1)
    expected = [[1.79792307, 2.08106978, 0.4728433], [1.28314672, 1.48522365, 0.33746012]]
    np.testing.assert_allclose(materialized(fit)[0], expected, rtol=1e-5)
    lost = np.sum((weight - materialized(fit)) ** 2 * [13, 2, 1])
    assert lost == pytest.approx(9.16215137, rel=1e-5)
    assert fit.outcomes == ()


def test_it_is_the_svd_of_scaled_columns():
    weight, fisher = RNG.normal(size=(3, 12, 20)), RNG.exponential(size=(3, 12, 20)) * np.geomspace(9, 1e-6, 20)
    found = materialized(published(weight, fisher, 4))
    for own, seen, approximate in zip(weight, fisher, found, strict=True):
        columns = seen.sum(0)
        scale = np.sqrt(np.maximum(columns, 1e-3 * columns.mean()))
        left, values, right = np.linalg.svd(own * scale, full_matrices=False)
        np.testing.assert_allclose(approximate, (left[:, :4] * values[:4]) @ right[:4] / scale, atol=2e-4)


def test_experts_without_gradients_are_fitted_plainly():
    weight, fisher = RNG.normal(size=(3, 12, 20)), RNG.exponential(size=(3, 12, 20))
    fisher[1] = 0
    fit = published(weight, fisher, 4)
    left, values, right = np.linalg.svd(weight[1], full_matrices=False)
    np.testing.assert_allclose(materialized(fit)[1], (left[:, :4] * values[:4]) @ right[:4], atol=1e-4)
    (outcome,) = fit.outcomes
    assert outcome.kind == "unweighted"
    assert outcome.detail.startswith("experts 1: ")
    with pytest.raises(JaxmoeError, match="squared gradients"):
        published(weight, np.full_like(fisher, np.nan), 4)
    (outcome,) = published(weight, None, 4).outcomes
    assert outcome.kind == "no_fisher"


@pytest.mark.parametrize("target", ["gate", "down"])
def test_improved_serves_the_inputs_with_unequal_ranks(target):
    inputs, moment = moments(SHAPE.of(target)[2], shared=False)
    aware, weight = fitted("fwsvd", target, level=36, moment=moment)
    plain, _ = fitted("fwsvd", target, level=36)
    assert isinstance(aware.terms[0], Grouped)
    assert sum(aware.terms[0].group_ranks) == 36
    lost = [np.linalg.norm(np.einsum("eti,eoi->eto", inputs, weight - materialized(own))) for own in (aware, plain)]
    assert lost[0] < 0.9 * lost[1]
    assert [own.kind for own in plain.outcomes] == ["no_fisher"]


def test_settings_and_requirements():
    paper = FWSVD.settings(setting="paper")
    assert set(FWSVD.targets(SHAPE, paper)) == set(WEIGHTS)
    assert set(FWSVD.requires(paper)) == {"fisher_up", "fisher_down"}
    assert FWSVD.requires(FWSVD.settings()) == {}
    slot = FWSVD.slot("down", SHAPE, np.dtype("float32"), paper, 0.5)
    (term,) = slot.at(slot.high)
    assert isinstance(term, LowRank)
    assert term.count().numbers < np.prod(SHAPE.of("down"))
    with pytest.raises(JaxmoeError, match="setting 'best'"):
        FWSVD.settings(setting="best")
