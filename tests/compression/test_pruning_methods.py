"""The slimming methods on the bundled checkpoint, through the library and the command line."""

import json

import numpy as np
import pytest
from planned import prune_plan
from program import call, checksums
from two_layers import short_demo

import jaxmoe
from jaxmoe import Checkpoint, methods
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.evaluation import evaluate
from jaxmoe.report.events import LayerDone
from jaxmoe.texts import Tokenizer, text_windows

SLIM = ("frequency", "reap", "camera", "nystrom")


def calibrated(source, folder, length):
    tokenizer = Tokenizer.open(source)
    windows = text_windows(demo_texts(), tokenizer, length=length, count=8)
    calibrate_windows(StoredModel(source), windows, folder, tokenizer=tokenizer.fingerprint)
    return Statistics.open(folder)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    return calibrated(short_demo(), tmp_path_factory.mktemp("slim") / "statistics", 64)


def compressed(name, folder, statistics, *, source=None, setting="improved"):
    options = {"setting": setting, "statistics": statistics.folder}
    return jaxmoe.compress(source or short_demo(), folder, name, ratio=0.25, **options).as_json()


def test_frequency_and_reap_keep_what_their_formulas_say(tmp_path, statistics):
    for name in ("frequency", "reap"):
        report = compressed(name, tmp_path / name, statistics)
        for layer in report["layers"]:
            record = statistics.layer(layer["layer"])
            score = record.counts.astype(float)
            if name == "reap":
                score = record.weighted_output_norms / np.maximum(1, record.counts)
            kept = layer["kept"]
            assert len(kept) == 12
            assert min(score[kept]) >= max(np.delete(score, kept))
            assert layer["projections"]["down"]["error"] == pytest.approx(0.25)


def test_router_rows_go_with_their_experts(tmp_path, statistics):
    report = compressed("reap", tmp_path / "small", statistics)
    before, after = Checkpoint.open(short_demo()), Checkpoint.open(tmp_path / "small")
    name = "model.layers.1.mlp.gate.weight"
    kept = report["layers"][1]["kept"]
    np.testing.assert_array_equal(after.matrices[name].read(), before.matrices[name].read()[kept])
    for projection in ("gate", "up", "down"):
        own, source = (c.projection(c.layers[1], projection) for c in (after, before))
        np.testing.assert_array_equal(own, source[kept])
    changed = {t for t in after.tensors if ".mlp." in t}
    for untouched in after.tensors.keys() - changed:
        np.testing.assert_array_equal(after.matrices[untouched].read(), before.matrices[untouched].read())


def test_better_methods_lose_less(tmp_path):
    """Refitting beats slicing, weighing beats counting; the paper's leverage is behind the greedy choice."""
    loss, source = {}, demo_checkpoint()
    statistics = calibrated(source, tmp_path / "statistics", 128)
    for name, settings in (
        ("frequency", {}),
        ("reap", {}),
        ("camera", {}),
        ("nystrom", {"setting": "paper"}),
        ("nystrom", {}),
    ):
        label = f"{name}-{settings.get('setting', 'improved')}"
        compressed(name, tmp_path / label, statistics, source=source, **settings)
        result = evaluate(tmp_path / label, text=demo_texts(), sequences=4, length=64, generate=0)
        loss[label] = np.log(result.geometric_mean_perplexity)
    assert loss["reap-improved"] < loss["frequency-improved"]
    assert loss["nystrom-improved"] < min(loss["camera-improved"], loss["nystrom-paper"])


def test_a_run_that_was_stopped_goes_on(tmp_path, statistics):
    compressed("nystrom", tmp_path / "whole", statistics)
    options = {"ratio": 0.25, "statistics": statistics.folder}

    def stop(event):
        if isinstance(event, LayerDone) and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jaxmoe.compress(short_demo(), tmp_path / "stopped", "nystrom", on_event=stop, **options)
    assert not (tmp_path / "stopped").exists()
    seen = []
    jaxmoe.compress(short_demo(), tmp_path / "stopped", "nystrom", on_event=seen.append, **options)
    assert [event.resumed for event in seen if isinstance(event, LayerDone)] == [True, False]
    assert checksums(tmp_path / "stopped") == checksums(tmp_path / "whole")


def test_sizes_are_what_was_asked_for(tmp_path):
    checkpoint = Checkpoint.open(short_demo())
    for name in SLIM:
        recipe = methods.get(name)
        for of in ("experts", "touched", "model"):
            plan = prune_plan(checkpoint, recipe, recipe.settings(multiple=1), ratio=0.3, of=of)
            achieved = plan.sizes.removed()
            assert achieved[of] >= 0.3
            step = 1 / plan.before
            assert achieved["experts"] - step < 0.3 * (achieved["experts"] / achieved[of])
        plan = prune_plan(checkpoint, recipe, recipe.settings(multiple=4), ratio=0.3)
        assert plan.keep % 4 == 0
    with pytest.raises(JaxmoeError, match=r"keeps at least 4 experts: it can remove 0\.0625 to 0\.7500 of touched"):
        jaxmoe.plan(short_demo(), "reap", ratio=0.9)


BAD = {
    "no statistics": ((), "reap with these settings cannot run: there are no statistics; calibrate with --text"),
    "not slim": (("--export", "dense"), "writes a checkpoint of the original architecture"),
    "layers": (("--layers", "0:2"), "goes through all layers"),
    "allocation": (("--allocation", "spectral"), "keeps the same number in every layer"),
    "multiple": (("--set", "multiple=0"), "multiple=0: give at least 1"),
    "unknown setting": (("--set", "rho=1"), "the settings of reap are: multiple"),
}


def test_what_it_does_not_take_is_refused_before_calibration(tmp_path):
    for option in (("--sequential",), ("--export", "dense"), ("--layers", "0:2")):
        text = ("--text", demo_texts()[0], *option)
        run = call("compress", short_demo(), tmp_path / "out", "-m", "reap", "-r", 0.25, *text)
        assert run.returncode == 1
        assert "leave out --layers, --sequential and --export" in run.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, tmp_path, statistics):
    options, message = BAD[what]
    given = () if what == "no statistics" else ("--statistics", statistics.folder)
    run = call("compress", short_demo(), tmp_path / "out", "-m", "reap", "-r", 0.25, *given, *options)
    assert run.returncode == 1
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_slim_is_no_export_of_factors(tmp_path):
    run = call("compress", short_demo(), tmp_path / "out", "-m", "svd", "-r", 0.25, "--export", "slim")
    assert run.returncode == 1
    assert "svd removes no experts" in run.stderr


def test_command_line_writes_what_pytorch_runs(tmp_path, statistics):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    options = ("-m", "nystrom", "-r", 0.25, "--statistics", statistics.folder, "--json")
    run = call("compress", short_demo(), tmp_path / "small", *options)
    report = json.loads(run.stdout)
    assert report["kept"] == {"channels": 48}
    assert "any program that runs the original architecture" in (tmp_path / "small" / "README.md").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="float32")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    ids = torch.arange(64)[None] * 7 % 500
    with torch.no_grad():
        theirs = model(input_ids=ids).logits[0].numpy()
    ours = np.asarray(StoredModel(tmp_path / "small").decoder()(ids.numpy()))[0]
    assert np.linalg.norm(ours - theirs) < 2e-5 * np.linalg.norm(theirs)
    assert model.generate(ids[:, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)
