"""Quantising steps: bits in names and from budgets, exact bytes, recipes under one budget, runs that were stopped."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plain_checkpoint
import pytest
from program import call

import jaxmoe
from jaxmoe import Checkpoint, methods
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.compression import engine
from jaxmoe.compression.bit_costs import FLOOR, assumed_losses, measured_losses
from jaxmoe.compression.evidence import moments
from jaxmoe.compression.found import Found
from jaxmoe.compression.recipe import find
from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Dense
from jaxmoe.methods.method import DOWN_WEIGHT, Evidence
from jaxmoe.report.events import LayerDone

E, D, F = 4, 32, 16
COUNTS = np.array([300, 200, 50, 0])
PROJECTIONS = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a checkpoint of two layers whose rows have groups of 16 and 32."""
    sizes = {"hidden_size": D, "moe_intermediate_size": F}
    return plain_checkpoint.write(tmp_path_factory.mktemp("quantise") / "source", **sizes)


class Known:
    """Statistics of random inputs and gradients; the last expert is never chosen."""

    reads = (Path("statistics"),)

    def __init__(self, fisher=True):
        self.fisher = fisher

    @property
    def keeps(self):
        return frozenset(vars(self.layer(0)))

    def layer(self, index):
        draw = np.random.default_rng(index)

        def sums(side):
            inputs = [draw.normal(size=(count, side)) * np.geomspace(3, 0.3, side) for count in COUNTS]
            return np.stack([own.T @ own for own in inputs])

        found = {"input_moments": sums(D), "intermediate_moments": sums(F), "input_moment": None}
        if self.fisher:
            chosen = (COUNTS > 0)[:, None, None] * (1 + 9.0 * index)
            found |= {f"fisher_{name}": chosen * draw.random(shape) for name, shape in PROJECTIONS.items()}
        return SimpleNamespace(tokens=275, counts=COUNTS, **found)

    def inputs(self, index, name):
        return None

    def follow(self, index, parameters):
        pass

    def fingerprint(self):
        return f"fisher {self.fisher}"

    def describe(self):
        return {"tokens": 275, "domains": {"code": 275}, "sequential": False}


def made(source, output, name, *, statistics=None, options=None, setting="improved", **asked):
    recipe = find(name, options=options, setting=setting)
    given = {"statistics": statistics}
    return engine.compress(Checkpoint.open(source), output, recipe, recipe.asked(**asked), **given)


def stored(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def bytes_of(folder):
    return sum(entry.bytes for entry in read_tensors(folder).values())


def test_bits_stand_behind_the_name():
    recipe = find("svd+rtn3", options={"rtn3.group": 32})
    assert recipe.name == "svd+rtn3"
    assert (recipe.steps[1].settings.bits, recipe.steps[1].bits, recipe.steps[1].takes) == (3, 3, None)
    assert recipe.changed == {"rtn3.group": 32}
    assert (find("rtn", options={"bits": "3"}).sizes, find("rtn").sizes) == ((), ("ratio",))


WRONG = {
    "rtn9": r"rtn9: 9 bits: give 2 to 8",
    "rtn1": r"rtn1: 1 bits: give 2 to 8",
    "svd4": r"unknown method 'svd4': the methods are .*rtn, rtn4",
    "gptq4+rtn3": r"rtn3 does again what gptq4 does: give one of them",
    "svd+gptq": r"how large svd may be depends on the bits .* as in svd\+gptq4",
    "rtn4+reap": r"rtn4 stores factors, on which reap cannot work; the order is reap\+rtn4",
}


@pytest.mark.parametrize("name", WRONG)
def test_names_that_say_nothing(name):
    with pytest.raises(JaxmoeError, match=WRONG[name]):
        find(name)


def test_bits_are_given_once():
    with pytest.raises(
        JaxmoeError, match=r"--set bits=2: the name rtn4 says 4 bits; give one of them, rtn4 or rtn with"
    ):
        find("rtn4", options={"bits": 2})


@pytest.mark.parametrize(
    ("name", "asked", "match"),
    [
        (
            "rtn4",
            {"ratio": 0.5, "unit": "bytes"},
            r"--ratio: rtn4 takes no ratio; .*; without bits in their names, .*rtn",
        ),
        ("rtn", {"ratio": 0.7}, r"--unit parameters: rtn holds numbers in fewer bits, .* give --unit bytes"),
        ("svd+rtn4", {"ratio": 0.7}, r"--unit parameters: svd\+rtn4 .* give --unit bytes"),
        ("rtn", {}, r"rtn: give the fraction to remove, such as --ratio 0.8 --unit bytes, or bits, as in rtn4"),
        ("rtn", {"ratio": 0.95, "unit": "bytes"}, r"out of reach for rtn with 2 to 6 bits: it can remove 0\.\d+ to"),
        ("rtn", {"ratio": 0.2, "unit": "bytes"}, r"out of reach for rtn .* or bits, as in rtn6"),
    ],
)
def test_sizes_that_cannot_be(source, name, asked, match):
    with pytest.raises(JaxmoeError, match=match):
        jaxmoe.plan(source, name, **asked)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("rtn4", {}),
        ("rtn", {"ratio": 0.75, "unit": "bytes"}),
        ("rtn", {"ratio": 0.4, "unit": "bytes", "of": "model"}),
        ("svd+rtn4", {"ratio": 0.85, "unit": "bytes"}),
    ],
)
def test_the_plan_is_what_comes_out(source, tmp_path, name, asked):
    plan = jaxmoe.plan(source, name, **asked)
    report = jaxmoe.compress(source, tmp_path / "small", name, **asked)
    assert bytes_of(tmp_path / "small") == report.bytes.after == plan.bytes.after
    assert report.bits_per_weight == plan.bits_per_weight
    experts = 2 * 3 * E * D * F
    kept = (1 - report.achieved["experts"]) * 16
    assert report.bits_per_weight["experts"] == pytest.approx(kept)
    assert report.achieved["experts"] * experts * 2 == pytest.approx(report.bytes.before - report.bytes.after)
    assert report.requested.unit == "bytes"
    assert [own.bits for own in report.layers] == [own.bits for own in plan.layers]
    card = (tmp_path / "small" / "README.md").read_text()
    for what, own in (
        ("stored bits for each original number", report.bits_per_weight),
        ("fraction of bytes removed", report.achieved),
        ("fraction of stored numbers removed", report.removed["parameters"]),
    ):
        assert f"| {what} | {own['touched']:.4f} | {own['experts']:.4f} | {own['model']:.4f} |" in card
    if "ratio" in asked:
        of = asked.get("of", "experts")
        assert asked["ratio"] <= report.achieved[of] < asked["ratio"] + 0.02


LITTLE = {"search": False, "refine": 0}
"""Work for the rounding, where it is not the rounding that is looked at."""


def test_a_budget_of_bits_is_spent_exactly_where_they_gain_most(source, tmp_path):
    report = made(source, tmp_path / "small", "gptq", statistics=Known(), options=LITTLE, ratio=0.75, unit="bytes")
    assert report.allocation == "fisher"
    left = (report.achieved["experts"] - 0.75) * 2 * 3 * E * D * F * 2
    # One bit more for one matrix of an expert is a byte for eight numbers, and that of its zeros.
    assert 0 <= left < D * F / 8 + 8
    first, second = ({name: np.array(own) for name, own in layer.bits.items()} for layer in report.layers)
    assert sum(x.sum() for x in second.values()) > sum(x.sum() for x in first.values())
    # What is stored is what the report says: bits of the codes and their order.
    opened = CompressedCheckpoint.open(tmp_path / "small")
    for module, own in zip(opened.modules, (first, second), strict=True):
        for target, (term,) in opened.layer(module).terms.items():
            parts = getattr(term.weight, "parts", (term.weight,))
            order = np.asarray(getattr(term.weight, "order", np.arange(E))).reshape(-1)
            found = np.concatenate([np.full(part.shape[0], part.store.bits) for part in parts])
            np.testing.assert_array_equal(found, own[target][order])


@pytest.mark.parametrize("level", ["expert", "layer", "model"])
def test_what_has_bits_of_its_own(source, level):
    plan = jaxmoe.plan(source, "rtn", ratio=0.75, unit="bytes", set={"bits_per": level})
    layers = [np.array(list(own.bits.values())) for own in plan.layers]
    if level == "expert":
        assert all((own == own[0]).all() for own in layers)
        assert len(np.unique(layers)) > 1
    else:
        assert all((own == own[0, 0]).all() for own in layers)
    if level == "model":
        assert (layers[0] == layers[1]).all()
    with pytest.raises(JaxmoeError, match="bits_per 'row': give matrix, expert, layer, model"):
        jaxmoe.plan(source, "rtn", ratio=0.75, unit="bytes", set={"bits_per": "row"})


def rounded(method, settings, matrices, bits, moment=None):
    known = Evidence(target="down", moment=moment)
    fit = method.fit((Dense(weight=matrices),), settings, np.full(len(matrices), bits), evidence=known, key=None)
    return np.asarray(fit.terms[0].materialize(), np.float64)


def test_losses_equal_numpy(source):
    """By Fisher, by second moments and by weights alone; the expert that no token chose has a floor."""
    checkpoint, method = Checkpoint.open(source), methods.get("rtn")
    settings, found = method.settings(), Found.of(checkpoint)
    matrices = checkpoint.target(checkpoint.layers[1], "down")
    for statistics in (Known(), Known(fisher=False), None):
        own = measured_losses(found, method, settings, (2, 4), statistics)[1]["down"]
        moment = None if statistics is None else moments(statistics.layer(1), "down")
        expected = np.empty((E, 2))
        for column, bits in enumerate((2, 4)):
            error = rounded(method, settings, matrices, bits, moment) - matrices
            if statistics is None:
                lost = DOWN_WEIGHT * (error**2).sum((1, 2)) * D * F / (matrices.astype(np.float64) ** 2).sum()
            elif statistics.fisher:
                lost = (statistics.layer(1).fisher_down * error**2).sum((1, 2))
            else:
                lost = DOWN_WEIGHT * np.einsum("eoi,eij,eoj->e", error, moment, error)
            expected[:, column] = np.maximum(lost, FLOOR * np.median(lost))
        np.testing.assert_allclose(own, expected, rtol=1e-4)
        assert (own[:, 0] > own[:, 1]).all()
    assert own[3, 0] > 0


def test_sizes_alone_give_down_more_bits(source):
    losses = assumed_losses(Found.of(Checkpoint.open(source)), (2, 3))[0]
    assert (losses["down"] == DOWN_WEIGHT * losses["gate"]).all()
    assert (losses["down"][:, 0] == 4 * losses["down"][:, 1]).all()


def test_factors_have_as_many_more_numbers_as_their_bits_are_fewer(source):
    asked = {"ratio": 0.8, "unit": "bytes"}
    plain, few = (jaxmoe.plan(source, name, **asked) for name in ("svd", "svd+rtn4"))
    ranks = [
        sum(x for layer in plan.layers for p in layer.projections.values() for x in p.ranks) for plan in (plain, few)
    ]
    assert ranks[1] > 2 * ranks[0]
    assert few.bits_per_weight["experts"] <= 0.2 * 16


@pytest.mark.parametrize("name", ["svd+rtn4", "mobe+rtn4", "mobe+rtn3"])
@pytest.mark.parametrize("ratio", [0.8, 0.85])
def test_packed_factors_keep_to_the_budget(name, ratio):
    """Sizes of packed factors are no multiples of a step: words and groups fill up. At least as much goes as asked."""
    removed = jaxmoe.plan(demo_checkpoint(), name, ratio=ratio, unit="bytes").achieved["experts"]
    assert ratio <= removed < ratio + 0.01


def test_a_run_that_was_stopped_ends_with_the_same_bytes(source, tmp_path):
    asked = {"ratio": 0.75, "unit": "bytes"}
    jaxmoe.compress(source, tmp_path / "whole", "rtn", **asked)

    def stop(event):
        if isinstance(event, LayerDone) and event.layer == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jaxmoe.compress(source, tmp_path / "again", "rtn", **asked, on_event=stop)
    seen = []
    jaxmoe.compress(source, tmp_path / "again", "rtn", **asked, on_event=seen.append)
    assert [event.resumed for event in seen if isinstance(event, LayerDone)] == [True, False]
    assert stored(tmp_path / "whole") == stored(tmp_path / "again")


def test_the_recipe_file_makes_the_same_again(source, tmp_path):
    made(source, tmp_path / "one", "svd+rtn3", options={"rtn3.group": 16}, ratio=0.8, unit="bytes")
    recipe = tmp_path / "one" / "recipe.yaml"
    assert "svd+rtn3" in recipe.read_text()
    done = call("compress", source, tmp_path / "two", "--recipe", recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"][1]["settings"]["bits"] == 3
    assert stored(tmp_path / "one") == stored(tmp_path / "two")


def test_removing_first_counts_bytes_behind_the_bits(source):
    """What stays is counted in the bits that it gets, and free bits spend what is left exactly."""
    plan = jaxmoe.plan(source, "frequency+rtn4", ratio=0.8, unit="bytes")
    assert plan.achieved["experts"] >= 0.8
    assert plan.steps[0].kept == {"experts": 2}
    free = jaxmoe.plan(source, "frequency+rtn", ratio=0.85, unit="bytes")
    assert free.steps[0].kept == {"experts": 3}
    assert 0.85 <= free.achieved["experts"] < 0.86
    with pytest.raises(JaxmoeError, match=r"out of reach for frequency.* 0\.\d+ to 0\.\d+ of experts"):
        jaxmoe.plan(source, "frequency+rtn4", ratio=0.97, unit="bytes")


def test_quantmoe_as_published_gives_four_bits_to_what_is_used_most(source, tmp_path):
    """Whole experts at 2 or 4 bits: the first layer's first, then the same number of every layer, by counts."""
    known = {"statistics": Known(), "setting": "paper", "options": {"group": 16}}
    report = made(source, tmp_path / "small", "quantmoe", **known, ratio=0.7, unit="bytes")
    first, second = (np.array(list(layer.bits.values())) for layer in report.layers)
    assert (first == 4).all()
    assert (second == second[0]).all()
    assert second[0, 0] == 4
    assert second[0, 3] == 2
    assert (np.diff(second[0]) <= 0).all()
