"""What slots cost when they shrink, against numpy, and plans that share a budget by it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import plain_checkpoint
import pytest
from planned import make_plan
from program import call
from two_layers import short_demo

from jaxmoe import Checkpoint, methods
from jaxmoe.compression.evidence import moments
from jaxmoe.compression.slot_costs import choose_rule, fisher_loss, shares, spectrum
from jaxmoe.data import demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.methods.svd import break_even

E, D, F = 4, 16, 8
SHAPE = LayerShape(experts=E, hidden=D, intermediate=F)
LAYER: Any = SimpleNamespace(index=0, shape=SHAPE)


def drawn(target, seed=0):
    return np.random.default_rng(seed).normal(size=SHAPE.of(target)).astype(np.float32)


def sums(seed=0, scale=1.0, **changes) -> Any:
    """Statistics of one layer, with the diagonal Fisher information of all projections."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(E, 50, D)) * np.geomspace(3, 0.1, D)
    inner = rng.normal(size=(E, 50, F)) * np.geomspace(2, 0.1, F)
    own = np.einsum("eti,etj->eij", inputs, inputs)
    made = {
        "tokens": 100,
        "counts": np.full(E, 50),
        "input_moments": own,
        "input_moment": own.sum(0) / 2,
        "intermediate_moments": np.einsum("eti,etj->eij", inner, inner),
        **{f"fisher_{p}": scale * rng.random(SHAPE.of(p)) for p in ("gate", "up", "down")},
    }
    return SimpleNamespace(**(made | changes))


class Recorded:
    """Statistics of all layers: the second layer matters more."""

    def __init__(self, sequential=False, without=()):
        self.sequential, self.without = sequential, without

    @property
    def keeps(self):
        return frozenset(vars(sums())) - set(self.without)

    def layer(self, index):
        return sums(seed=index, scale=1 + 9 * index, **dict.fromkeys(self.without))

    def follow(self, index, layer):
        raise AssertionError("a plan compresses nothing")

    def describe(self):
        return {"sequential": self.sequential}

    def fingerprint(self):
        return "recorded"


FISHER = ("fisher_gate", "fisher_up", "fisher_down")


@pytest.mark.parametrize("target", ["gate", "up", "gate_up", "down"])
def test_loss_is_what_removal_costs_by_the_fisher_information(target):
    weight, known = drawn(target), sums()
    parts = {"gate_up": ("gate", "up")}.get(target, (target,))
    fisher = np.concatenate([getattr(known, f"fisher_{part}") for part in parts], axis=1)
    expected = np.sum(fisher * weight.astype(np.float64) ** 2)
    assert fisher_loss(weight, known, target) == pytest.approx(expected, rel=1e-12)
    assert fisher_loss(3 * weight, known, target) == pytest.approx(9 * expected, rel=1e-6)


def test_loss_is_unknown_where_a_part_is():
    assert fisher_loss(drawn("down"), None, "down") is None
    assert fisher_loss(drawn("gate_up"), sums(fisher_up=None), "gate_up") is None
    assert fisher_loss(drawn("gate"), sums(fisher_up=None), "gate") is not None
    assert fisher_loss(drawn("down"), SimpleNamespace(), "down") is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["gate_up", "up", "down"])
def test_spectrum_is_that_of_all_experts_in_units_of_the_loss(target, weighted):
    weight, known = drawn(target), sums() if weighted else None
    moment = moments(known, target)
    root = np.eye(weight.shape[2])[None] if moment is None else np.linalg.cholesky(moment)
    values = np.linalg.svd(weight.astype(np.float64) @ root, compute_uv=False) ** 2
    expected = np.sort(values.ravel())[::-1] * (7.0 / values.sum())
    found = spectrum(weight, moment, 7.0)
    most = E * break_even(weight.shape)
    assert len(found) == most < values.size
    np.testing.assert_allclose(found, expected[:most], rtol=1e-4)


def test_spectrum_of_zeros_is_zero():
    found = spectrum(np.zeros(SHAPE.of("down"), np.float32), None, 3.0)
    assert not found.any()


@pytest.mark.parametrize(
    ("asked", "preferred", "statistics", "rule"),
    [
        (None, "importance", None, "uniform"),
        (None, "importance", Recorded(), "importance"),
        (None, "importance", Recorded(without=FISHER), "uniform"),
        (None, "importance", Recorded(sequential=True), "uniform"),
        (None, "spectral", None, "spectral"),
        (None, "spectral", Recorded(sequential=True), "uniform"),
        ("uniform", "importance", Recorded(), "uniform"),
        ("spectral", "uniform", Recorded(without=FISHER), "spectral"),
        ("importance", "uniform", Recorded(), "importance"),
    ],
)
def test_a_rule_is_taken_where_the_statistics_allow_it(asked, preferred, statistics, rule):
    assert choose_rule(asked, preferred, statistics) == rule


@pytest.mark.parametrize(
    ("asked", "statistics", "message"),
    [
        ("fair", None, "'fair': give uniform, importance, spectral"),
        ("importance", None, "allocation importance: .*--gradients"),
        ("importance", Recorded(without=FISHER), "--gradients sequence"),
        ("importance", Recorded(sequential=True), "leave --sequential out"),
        ("spectral", Recorded(sequential=True), "leave --sequential out"),
    ],
)
def test_a_rule_that_was_asked_for_is_not_replaced(asked, statistics, message):
    with pytest.raises(JaxmoeError, match=message):
        choose_rule(asked, "uniform", statistics)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint.open(plain_checkpoint.write(tmp_path_factory.mktemp("measured") / "source"))


@pytest.mark.parametrize("rule", ["uniform", "importance", "spectral"])
@pytest.mark.parametrize("name", ["svd", "rfid", "d2moe"])
def test_plans_meet_the_ratio_by_every_rule(checkpoint, name, rule):
    recipe = methods.get(name)
    options = {"allocation": rule, "statistics": Recorded()}
    chosen = recipe.settings(**({"base": "always"} if name == "d2moe" else {}))
    plan = make_plan(checkpoint, recipe, chosen, ratio=0.4, **options)
    assert plan.allocation == rule
    budget = int(plan.sizes.before.touched.numbers - np.ceil(round(0.4 * plan.sizes.before.experts.numbers, 6)))
    steps = []
    for layer in plan.layers:
        for target in layer.touched:
            slot = recipe.slot(target, layer.source.shape, layer.source.dtype, chosen, 0.6, weighted=True)
            steps.append(slot.ladder().step)
    assert 0 <= budget - plan.sizes.after.touched.numbers < max(steps)
    assert plan.sizes.removed()["experts"] >= 0.4


def stored(plan):
    return [planned.template.count().numbers for planned in plan.layers]


def test_importance_keeps_more_where_removal_costs_more(checkpoint):
    recipe = methods.get("svd")
    given = {"ratio": 0.4, "statistics": Recorded()}
    even = stored(make_plan(checkpoint, recipe, recipe.settings(), allocation="uniform", **given))
    own = stored(make_plan(checkpoint, recipe, recipe.settings(), allocation="importance", **given))
    assert abs(even[0] - even[1]) < 0.05 * even[0]
    assert own[1] > 1.3 * own[0]


def test_shares_are_those_of_the_measured_losses(checkpoint):
    targets = [{"gate_up": 1.0, "down": 5.0}] * 2
    rule = shares("importance", checkpoint, targets, Recorded())
    losses, sizes = [], []
    for index, layer in enumerate(checkpoint.layers):
        known = Recorded().layer(index)
        for target in targets[0]:
            names = {"gate_up": ("gate", "up"), "down": ("down",)}[target]
            weight = [np.asarray(checkpoint.projection(layer, n), np.float64) for n in names]
            losses.append(sum(np.sum(getattr(known, f"fisher_{n}") * w**2) for n, w in zip(names, weight)))
            sizes.append(sum(w.size for w in weight))
    density = np.array(losses) / sizes
    kept = np.array(rule(0.999))
    # Where nearly all is kept, what is removed is in proportion to size / loss: odds of 1 / density.
    removed = (1 - kept) * density
    np.testing.assert_allclose(removed / removed[0], 1, rtol=0.05)


def test_without_gradients_importance_is_refused_by_the_command_line(tmp_path):
    text = ("--text", demo_texts()[0])
    for arguments in ((), ("--statistics", tmp_path / "statistics")):
        if arguments:
            made = call("calibrate", short_demo(), arguments[1], *text, "--sequences", "1", "--length", "16")
            assert made.returncode == 0, made.stderr
        given = ("--method", "svd", "--ratio", "0.4", "--allocation", "importance", *arguments)
        done = call("compress", short_demo(), tmp_path / "small", *given)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("error: allocation importance")
        assert "--gradients" in done.stderr
        assert not (tmp_path / "small").exists()
