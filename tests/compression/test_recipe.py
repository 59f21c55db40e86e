"""Chains: one budget for all steps, what a plan says is what comes out, and a run that was stopped goes on."""

import json
import math
from dataclasses import replace
from fractions import Fraction

import pytest
from program import call, checksums

from jaxmoe import Checkpoint
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.comparison import Contender
from jaxmoe.compression.chain import ChainSettings, compress_chain, find, plan_chain
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.report.events import Calibrated, Complete, LayerDone
from jaxmoe.texts import Tokenizer, text_windows

TOKENIZER = Tokenizer.open(demo_checkpoint())
TEXTS = text_windows(demo_texts()[:2], TOKENIZER, length=64, count=8)


def chained(name, setting="improved"):
    chain = find(name)
    return chain, ChainSettings(setting=setting, steps=tuple(step.settings(setting=setting) for step in chain.steps))


def run(folder, name="reap+svd", ratio=0.4, **options):
    chain, settings = chained(name)
    return compress_chain(
        Checkpoint.open(demo_checkpoint()),
        folder,
        chain,
        settings,
        ratio=ratio,
        texts=TEXTS,
        tokenizer=TOKENIZER.fingerprint,
        **options,
    )


@pytest.mark.parametrize("of", ["experts", "touched", "model"])
@pytest.mark.parametrize("name", ["reap+svd", "camera+svd", "frequency+reap+svd"])
def test_the_budget_is_spent_once(name, of):
    checkpoint = Checkpoint.open(demo_checkpoint())
    chain, settings = chained(name)
    plan = plan_chain(checkpoint, chain, settings, ratio=0.4, of=of)
    scope = checkpoint.parameters if of == "model" else sum(layer.shape.numbers for layer in checkpoint.layers)
    removed = round(plan["achieved"][of] * scope)
    cheapest = 128 + 64
    assert 0 <= removed - math.ceil(Fraction("0.4") * scope) < cheapest
    kept = math.prod(1 - step["achieved"]["experts"] for step in plan["steps"])
    assert kept == pytest.approx(1 - plan["achieved"]["experts"], abs=1e-12)
    assert [step["method"] for step in plan["steps"]] == name.split("+")


def test_shares_say_what_falls_to_a_step():
    checkpoint = Checkpoint.open(demo_checkpoint())
    chain, settings = chained("camera+reap+svd")

    def kept(shares):
        plan = plan_chain(checkpoint, chain, replace(settings, shares=shares), ratio=0.6)
        assert 0.6 <= plan["achieved"]["experts"] < 0.601
        return [1 - step["achieved"]["experts"] for step in plan["steps"]]

    assert kept(None) == kept((1, 1, 1)) == kept((2.0, 2.0, 2.0))
    # Of 64 channels, kept in eights, and of 16 experts the nearest number stays: 0.4^(1/3) and 0.4^(1/6) of them.
    assert kept(None)[:2] == [48 / 64, 12 / 16]
    assert kept((1, 1, 4))[:2] == [56 / 64, 14 / 16]
    assert kept((4, 1, 1))[:2] == [32 / 64, 14 / 16]


@pytest.mark.parametrize("name", ["reap+svd", "camera+reap"])
def test_the_plan_is_what_comes_out(tmp_path, name):
    plan = plan_chain(Checkpoint.open(demo_checkpoint()), *chained(name), ratio=0.4, weighted=True)
    report = run(tmp_path / "small", name)
    stored = read_tensors(tmp_path / "small").values()
    assert sum(entry.numbers for entry in stored) == report["parameters"]["after"]
    assert sum(entry.bytes for entry in stored) == report["bytes"]["after"]
    assert plan["parameters"] == report["parameters"]
    assert plan["bytes"] == report["bytes"]
    assert report["method"] == plan["method"] == name
    assert report["source"] == str(demo_checkpoint())
    assert report["achieved"]["experts"] >= 0.4
    assert [step["method"] for step in report["steps"]] == name.split("+")
    assert not list(tmp_path.glob("small.*"))
    assert StoredModel(tmp_path / "small").decoder() is not None


def test_a_stopped_chain_goes_on_to_the_same_bytes(tmp_path):
    run(tmp_path / "whole")
    seen = []

    def stop(event):
        seen.append(event)
        if sum(isinstance(event, LayerDone) for event in seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", on_event=stop)
    assert not (tmp_path / "stopped").exists()
    seen.clear()
    run(tmp_path / "stopped", on_event=seen.append)
    layers = [event.resumed for event in seen if isinstance(event, LayerDone)]
    # The first step is complete and is not gone through again; of the second, two layers were.
    assert layers == [True, True, False, False]
    assert not [event for event in seen if isinstance(event, Calibrated)]
    assert checksums(tmp_path / "stopped") == checksums(tmp_path / "whole")
    # And once more it is found finished.
    seen.clear()
    run(tmp_path / "stopped", on_event=seen.append)
    assert [type(event) for event in seen] == [Complete]
    with pytest.raises(JaxmoeError, match="holds something else"):
        run(tmp_path / "stopped", ratio=0.5)


def test_statistics_that_are_known_serve_the_first_step(tmp_path):
    known = calibrate_windows(
        StoredModel(demo_checkpoint()), TEXTS, tmp_path / "known", tokenizer=TOKENIZER.fingerprint
    )
    run(tmp_path / "with", statistics=known)
    run(tmp_path / "without")
    assert checksums(tmp_path / "with") == checksums(tmp_path / "without")


def test_a_last_step_that_needs_gradients_gets_them(tmp_path):
    chain, settings = chained("reap+d2moe", "paper")
    assert "fisher_down" in chain.requires(settings)
    options = {"texts": TEXTS, "tokenizer": TOKENIZER.fingerprint}
    report = compress_chain(
        Checkpoint.open(demo_checkpoint()), tmp_path / "small", chain, settings, ratio=0.4, **options
    )
    assert report["steps"][1]["method"] == "d2moe"


BAD = {
    "factors first": (("-m", "svd+reap", "-r", 0.4), "svd stores factors"),
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
    done = call("compress", demo_checkpoint(), tmp_path / "out", *options, "--text", demo_texts()[0])
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_without_text_it_says_what_it_needs(tmp_path):
    done = call("compress", demo_checkpoint(), tmp_path / "out", "-m", "reap+svd", "-r", 0.4)
    assert done.returncode == 1
    assert "every step is calibrated on what it finds; give --text" in done.stderr


def test_the_command_of_a_cell_has_its_shares(tmp_path):
    chain, settings = chained("reap+svd")
    contender = Contender(method=chain, settings=replace(settings, shares=(1.0, 2.0)))
    assert contender.options()[4:] == ["--set", "reap.share=1.0", "--set", "svd.share=2.0"]
    done = call("plan", demo_checkpoint(), "-r", 0.4, *contender.options(), "--json")
    assert done.returncode == 0, done.stderr
    plan = plan_chain(Checkpoint.open(demo_checkpoint()), chain, contender.settings, ratio=0.4)
    assert json.loads(done.stdout)["steps"] == plan["steps"]
    assert plan["settings"]["svd"]["share"] == 2.0
