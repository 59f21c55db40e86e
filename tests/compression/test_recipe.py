"""Recipes of several steps: one budget, what a plan says is what comes out, and a run that was stopped resumes."""

import json
import math
from fractions import Fraction

import pytest
from program import call, checksums
from two_layers import short_demo

import jaxmoe
from jaxmoe import Checkpoint
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.comparison.cells import recipe_options
from jaxmoe.compression import engine
from jaxmoe.compression.recipe import find
from jaxmoe.compression.step import Texts
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.report.events import Calibrated, Complete, LayerDone
from jaxmoe.texts import Tokenizer, text_windows

SHORT = {"sequences": 4, "length": 32}
TEXT = demo_texts()[:2]


def run(folder, name="reap+svd", ratio=0.4, **options):
    return jaxmoe.compress(short_demo(), folder, name, ratio=ratio, text=TEXT, **SHORT, **options)


def planned(name, source=None, **options):
    return jaxmoe.plan(source or short_demo(), name, **options).as_json()


@pytest.mark.parametrize("of", ["experts", "touched", "model"])
@pytest.mark.parametrize("name", ["reap+svd", "camera+svd", "frequency+reap+svd"])
def test_the_budget_is_spent_once(name, of):
    checkpoint = Checkpoint.open(demo_checkpoint())
    plan = planned(name, demo_checkpoint(), ratio=0.4, of=of)
    scope = checkpoint.parameters if of == "model" else sum(layer.shape.numbers for layer in checkpoint.layers)
    removed = round(plan["achieved"][of] * scope)
    cheapest = 128 + 64
    assert 0 <= removed - math.ceil(Fraction("0.4") * scope) < cheapest
    kept = math.prod(1 - step["achieved"]["experts"] for step in plan["steps"])
    assert kept == pytest.approx(1 - plan["achieved"]["experts"], abs=1e-12)
    assert [step["method"] for step in plan["steps"]] == name.split("+")


def test_shares_say_what_falls_to_a_step():
    def kept(shares):
        names = ("camera", "reap", "svd")
        settings = {f"{name}.share": share for name, share in zip(names, shares)}
        plan = planned("camera+reap+svd", ratio=0.6, set=settings)
        assert 0.6 <= plan["achieved"]["experts"] < 0.601
        return [1 - step["achieved"]["experts"] for step in plan["steps"]]

    assert kept(()) == kept((1, 1, 1)) == kept((2.0, 2.0, 2.0))
    # Of 64 channels, kept in eights, and of 16 experts the nearest number stays: 0.4^(1/3) and 0.4^(1/6) of them.
    assert kept(())[:2] == [48 / 64, 12 / 16]
    assert kept((1, 1, 4))[:2] == [56 / 64, 14 / 16]
    assert kept((4, 1, 1))[:2] == [32 / 64, 14 / 16]


@pytest.mark.parametrize("name", ["reap+svd", "camera+reap"])
def test_the_plan_is_what_comes_out(tmp_path, name):
    plan = planned(name, ratio=0.4, weighted=True)
    report = run(tmp_path / "small", name).as_json()
    stored = read_tensors(tmp_path / "small").values()
    assert sum(entry.numbers for entry in stored) == report["parameters"]["after"]
    assert sum(entry.bytes for entry in stored) == report["bytes"]["after"]
    assert plan["parameters"] == report["parameters"]
    assert plan["bytes"] == report["bytes"]
    assert report["method"] == plan["method"] == name
    assert report["source"] == str(short_demo())
    assert report["achieved"]["experts"] >= 0.4
    assert [step["method"] for step in report["steps"]] == name.split("+")
    assert not list(tmp_path.glob("small.*"))
    assert StoredModel(tmp_path / "small").decoder() is not None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a recipe of two steps writes."""
    folder = tmp_path_factory.mktemp("recipe") / "whole"
    run(folder)
    return folder


def test_a_stopped_recipe_resumes_to_the_same_bytes(whole, tmp_path):
    seen = []

    def stop(event):
        seen.append(event)
        if sum(isinstance(event, LayerDone) for event in seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", on_event=stop)
    assert not (tmp_path / "stopped").exists()
    seen.clear()
    run(tmp_path / "stopped", on_event=seen.append)
    layers = [event.resumed for event in seen if isinstance(event, LayerDone)]
    # The first step is complete and is not gone through again; of the second, one layer was.
    assert layers == [True, False]
    assert not [event for event in seen if isinstance(event, Calibrated)]
    assert checksums(tmp_path / "stopped") == checksums(whole)
    # And once more it is found finished.
    seen.clear()
    run(tmp_path / "stopped", on_event=seen.append)
    assert [type(event) for event in seen] == [Complete]
    with pytest.raises(JaxmoeError, match="holds something else"):
        run(tmp_path / "stopped", ratio=0.5)


def test_statistics_that_are_known_serve_the_first_step(whole, tmp_path):
    tokenizer = Tokenizer.open(short_demo())
    windows = text_windows(TEXT, tokenizer, length=SHORT["length"], count=SHORT["sequences"])
    texts = Texts(TEXT, SHORT["sequences"], SHORT["length"], windows, tokenizer.fingerprint)
    known = jaxmoe.calibrate(short_demo(), tmp_path / "known", text=TEXT, **SHORT)
    recipe, checkpoint = find("reap+svd"), Checkpoint.open(short_demo())
    engine.compress(checkpoint, tmp_path / "with", recipe, recipe.asked(ratio=0.4), texts=texts, statistics=known)
    assert checksums(tmp_path / "with") == checksums(whole)


def test_a_last_step_that_needs_gradients_gets_them(tmp_path):
    assert find("reap+d2moe", setting="paper").needs_gradients
    report = run(tmp_path / "small", "reap+d2moe", setting="paper")
    assert report.steps[1].method == "d2moe"


BAD = {
    "factors first": (
        ("-m", "svd+reap", "-r", 0.4),
        "svd stores factors, on which reap cannot work; the order is reap+svd",
    ),
    "unknown step": (("-m", "reap+magic", "-r", 0.4), "unknown method 'magic'"),
    "too little": (("-m", "reap+svd", "-r", 0.01), "cannot remove so little"),
    "too much": (("-m", "reap+svd", "-r", 0.9, "--of", "model"), "more than all routed experts"),
    "no fraction": (("-m", "reap+svd", "-r", 1.5), "is not a removed fraction"),
    "settings of no step": (("-m", "reap+svd", "-r", 0.4, "--set", "steps=3"), "give STEP.NAME=VALUE"),
    "no share": (("-m", "reap+svd", "-r", 0.4, "--set", "svd.share=0"), "give each step a positive number"),
    "share of no number": (("-m", "reap+svd", "-r", 0.4, "--set", "svd.share=x"), "takes svd.share as float"),
    "layers": (("-m", "reap+svd", "-r", 0.4, "--layers", "0:2"), "--layers: reap+svd does not take that"),
    "no factors": (("-m", "camera+reap", "-r", 0.4, "--export", "factored"), "leave out --layers, --sequential and"),
    "not slim": (("-m", "reap+svd", "-r", 0.4, "--export", "slim"), "svd removes no experts"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, tmp_path):
    options, message = BAD[what]
    done = call("compress", short_demo(), tmp_path / "out", *options, "--text", demo_texts()[0])
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_without_text_it_says_what_it_needs(tmp_path):
    done = call("compress", short_demo(), tmp_path / "out", "-m", "reap+svd", "-r", 0.4)
    assert done.returncode == 1
    assert "every step is calibrated on what it finds; give --text" in done.stderr


def test_the_command_of_a_cell_has_its_shares():
    options = recipe_options(find("reap+svd", options={"svd.share": 2}))
    assert options[4:] == ["--set", "reap.share=1.0", "--set", "svd.share=2.0"]
    done = call("plan", short_demo(), "-r", 0.4, *options, "--json")
    assert done.returncode == 0, done.stderr
    plan = planned("reap+svd", ratio=0.4, set={"svd.share": 2.0})
    assert json.loads(done.stdout)["steps"] == plan["steps"]
    assert plan["settings"]["svd"]["share"] == 2.0
