"""Targets beyond the experts: one budget, JAX and PyTorch alike, back to dense, resumed, refused where it must be."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import call, checksums
from random_windows import random_windows
from tiny_models import save_tiny
from two_layers import short_demo

import jaxmoe
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint import Checkpoint, read_header
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.compression import engine
from jaxmoe.compression.recipe import find
from jaxmoe.compression.step import Options, Texts
from jaxmoe.data import demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.decoder import forward
from jaxmoe.solvers.second_moment import expert_moments

torch = pytest.importorskip("torch")

IDS = np.random.default_rng(0).integers(3, 120, (2, 16)).astype(np.int32)
EVERYTHING = ("experts", "attention", "shared", "dense")


def logits(folder):
    model = StoredModel(folder)
    return np.asarray(jax.jit(forward, static_argnums=2)(jnp.asarray(IDS), model.parameters(), model.spec))


def torch_logits(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


def close(found, expected, tolerance=2e-5):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def stored(folder):
    """Return the elements and bytes of all tensors in a folder's files."""
    held = [entry for path in folder.glob("*.safetensors") for entry in read_header(path).values()]
    return sum(entry.numbers for entry in held), sum(entry.bytes for entry in held)


@pytest.mark.parametrize(
    ("family", "replaced"),
    [
        ("qwen3_moe", {"experts", "attention"}),
        ("deepseek_v3", {"experts", "attention", "shared"}),
    ],
)
def test_the_command_line_compresses_what_the_model_has_of_the_targets(family, replaced, tmp_path):
    save_tiny(family, tmp_path / "model")
    arguments = ("--method", "svd", "--targets", "experts,attention,shared", "--ratio", "0.3", "--of", "model")
    done = call("compress", tmp_path / "model", tmp_path / "small", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)

    # Every count is that of the files.
    numbers, size = stored(tmp_path / "small")
    assert (numbers, size) == (report["parameters"]["after"], report["bytes"]["after"])
    assert report["stored"] == {"parameters": numbers, "bytes": size}
    before = stored(tmp_path / "model")[0]
    assert report["achieved"]["model"] == pytest.approx(1 - numbers / before)
    assert 0.3 <= report["achieved"]["model"] < 0.303
    source, opened = Checkpoint.open(tmp_path / "model"), CompressedCheckpoint.open(tmp_path / "small")
    experts = sum(layer.shape.numbers for layer in source.layers)
    assert report["achieved"]["experts"] == pytest.approx(1 - opened.count().numbers / experts)
    touched = experts + sum(module.shape.numbers for module in opened.linears.values())
    assert report["achieved"]["touched"] == pytest.approx((before - numbers) / touched)

    # What is said of every layer is what lies there.
    names = {name.split(".")[0] for layer in report["layers"] for name in layer["projections"] if "." in name}
    assert names | {"experts"} == replaced
    for layer in report["layers"]:
        linear = {name: own for name, own in layer["projections"].items() if "." in name}
        assert all(0 < own["error"] < 1 and own["terms"][0]["rank"] == own["ranks"][0] for own in linear.values())
    told = " ".join(outcome["detail"] for outcome in report["outcomes"])
    assert ("nothing of the targets shared" in told) == ("shared" not in replaced)
    assert json.loads((tmp_path / "small" / "config.json").read_text())["jaxmoe"]["format_version"] == 2

    card = (tmp_path / "small" / "README.md").read_text()
    assert all(f"| {name} |" in card for layer in report["layers"] for name in layer["projections"] if "." in name)
    assert call("inspect", tmp_path / "small").returncode == 0

    found = logits(tmp_path / "small")
    assert np.abs(found - logits(tmp_path / "model")).max() > 0.1
    close(torch_logits(tmp_path / "small"), found)
    assert call("convert", tmp_path / "small", tmp_path / "dense", "--to", "dense").returncode == 0
    close(logits(tmp_path / "dense"), found)
    assert stored(tmp_path / "dense")[0] == before


@pytest.mark.parametrize(
    "family",
    [pytest.param("qwen2_moe", marks=pytest.mark.slow), "gpt_oss", "granitemoeshared", "hy_v3", "cohere2_moe"],
)
def test_biases_fused_and_renamed_maps_come_out_alike(family, tmp_path):
    """Maps with biases, gate and up in one tensor, other names on disk, ends tied: loaded, run and written back."""
    save_tiny(family, tmp_path / "model", **({"tie_word_embeddings": True} if family == "cohere2_moe" else {}))
    jaxmoe.compress(tmp_path / "model", tmp_path / "small", "svd", ratio=0.25, of="model", targets=EVERYTHING)
    found = logits(tmp_path / "small")
    close(torch_logits(tmp_path / "small"), found)
    dense = {"ratio": 0.25, "of": "model", "targets": EVERYTHING, "export": "dense"}
    jaxmoe.compress(tmp_path / "model", tmp_path / "dense", "svd", **dense)
    close(logits(tmp_path / "dense"), found)
    assert Checkpoint.open(tmp_path / "dense").tensors.keys() == Checkpoint.open(tmp_path / "model").tensors.keys()


def test_attention_alone_leaves_the_experts_as_they_were(tmp_path):
    save_tiny("mixtral", tmp_path / "model", dtype="bfloat16")
    report = jaxmoe.compress(
        tmp_path / "model", tmp_path / "small", "svd", ratio=0.3, of="touched", targets="attention"
    )
    assert report.achieved["experts"] == 0
    assert 0.3 <= report.achieved["touched"] < 0.31
    source, small = StoredModel(tmp_path / "model"), StoredModel(tmp_path / "small")
    for index in source.shapes:
        for name in ("gate", "up", "down"):
            expected = source.experts(index).materialize(name)
            assert np.array_equal(small.experts(index).materialize(name), expected)
    assert {own.target for own in small.factored_maps(1)} == {"attention"}


def test_moments_weigh_the_errors_of_every_map(tmp_path):
    """With statistics, what is kept of a map is the best of its rank for what it reads; without, of the matrix."""
    save_tiny("deepseek_v3", tmp_path / "model")
    model = StoredModel(tmp_path / "model")
    statistics = calibrate_windows(model, [random_windows()], tmp_path / "statistics", targets=EVERYTHING)
    options = {"ratio": 0.4, "of": "model", "targets": EVERYTHING}
    plain = jaxmoe.compress(tmp_path / "model", tmp_path / "plain", "svd", **options)
    options["statistics"] = tmp_path / "statistics"
    weighted = jaxmoe.compress(tmp_path / "model", tmp_path / "weighted", "svd", **options)
    assert not [outcome for outcome in weighted.outcomes if outcome.kind == "unweighted"]
    small = CompressedCheckpoint.open(tmp_path / "weighted")
    for own in (own for index in range(3) for own in model.linear_maps(index)):
        matrix = model.matrices[own.tensor].read().astype(np.float64)
        moment = statistics.inputs(own.index, own.reads)
        (whitening,) = expert_moments(moment.sums[None], np.array([moment.tokens]))
        root = np.linalg.cholesky(whitening)
        kept = small.linear(own.module)
        values = np.linalg.svd(matrix @ root, compute_uv=False)[kept.terms[0].rank :]
        error = np.linalg.norm((matrix - np.asarray(kept.materialize(), np.float64)) @ root)
        assert error == pytest.approx(np.sqrt((values**2).sum()), rel=1e-3)
    layers = zip(weighted.layers, plain.layers, strict=True)
    pairs = [(a.projections[n], b.projections[n]) for a, b in layers for n in a.projections if "." in n]
    assert all(one.weighted_error is not None and two.weighted_error is None for one, two in pairs)
    assert all(one.ranks == two.ranks and one.error >= two.error for one, two in pairs)


def test_statistics_of_experts_alone_are_said_to_lack_the_rest(tmp_path):
    save_tiny("mixtral", tmp_path / "model")
    calibrate_windows(StoredModel(tmp_path / "model"), [random_windows()], tmp_path / "statistics")
    options = {"ratio": 0.3, "of": "model", "targets": "experts,attention", "statistics": tmp_path / "statistics"}
    report = jaxmoe.compress(tmp_path / "model", tmp_path / "small", "svd", **options)
    told = {(outcome.layer, outcome.target) for outcome in report.outcomes if outcome.kind == "unweighted"}
    assert told == {(i, f"attention.{name}") for i in (0, 1) for name in ("query", "key", "value", "output")}
    assert "jaxmoe calibrate --targets attention" in next(o.detail for o in report.outcomes if o.kind == "unweighted")


TEXTS = Texts((), None, 16, [random_windows()], None)


@pytest.mark.parametrize("sequential", [False, True])
def test_text_is_calibrated_on_for_the_targets_and_killed_runs_resume(sequential, tmp_path):
    save_tiny("deepseek_v3", tmp_path / "model")
    recipe = find("svd")
    options = Options(targets=EVERYTHING, sequential=sequential)
    asked = recipe.asked(ratio=0.3, of="model")

    def compress(output, **given):
        checkpoint = Checkpoint.open(tmp_path / "model")
        return engine.compress(checkpoint, output, recipe, asked, options=options, texts=TEXTS, **given)

    whole = compress(tmp_path / "whole")
    assert [layer.layer for layer in whole.layers] == [0, 1, 2]
    assert not [outcome for outcome in whole.outcomes if outcome.kind == "unweighted"]

    def stop(event):
        if getattr(event, "layer", None) == 1 and hasattr(event, "projections"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "resumed", on_event=stop)
    assert (tmp_path / "resumed.partial" / "model-layer00000.safetensors").is_file()
    compress(tmp_path / "resumed")
    assert checksums(tmp_path / "resumed") == checksums(tmp_path / "whole")
    if not sequential:
        assert Statistics.open(tmp_path / "whole.statistics").record.targets == ("attention", "shared", "dense")


def test_later_steps_keep_what_stands_for_the_maps(tmp_path):
    """Vectors that compensate for experts are written beside factors of other maps, in one pass or in their own."""
    save_tiny("deepseek_v3", tmp_path / "model")
    options = {"ratio": 0.3, "of": "model", "targets": EVERYTHING}
    jaxmoe.compress(tmp_path / "model", tmp_path / "both", "svd+compressed_experts", main_experts=1, **options)
    jaxmoe.compress(tmp_path / "model", tmp_path / "first", "svd", **options)
    jaxmoe.compress(tmp_path / "first", tmp_path / "then", "compressed_experts", main_experts=1)
    for name in ("both", "then"):
        close(torch_logits(tmp_path / name), logits(tmp_path / name))
    opened = CompressedCheckpoint.open(tmp_path / "then")
    assert opened.linears == CompressedCheckpoint.open(tmp_path / "first").linears


def test_maps_that_no_rank_makes_smaller_stay_dense(tmp_path):
    save_tiny("deepseek_v3", tmp_path / "model", q_lora_rank=1)
    report = jaxmoe.compress(tmp_path / "model", tmp_path / "small", "svd", ratio=0.3, of="model", targets=EVERYTHING)
    kept = {"attention.query_down", "attention.query_up"}
    assert not kept & {name for layer in report.layers for name in layer.projections}
    (note,) = (outcome.detail for outcome in report.outcomes if "No rank makes" in outcome.detail)
    assert "q_a_proj.weight" in note
    close(torch_logits(tmp_path / "small"), logits(tmp_path / "small"))


@pytest.mark.parametrize("allocation", ["uniform", "spectral"])
@pytest.mark.parametrize("unit", ["parameters", "bytes"])
def test_one_budget_is_spent_over_all_targets(allocation, unit, tmp_path):
    save_tiny("deepseek_v3", tmp_path / "model", dtype="bfloat16")
    options = {"ratio": 0.4, "of": "touched", "unit": unit, "targets": EVERYTHING, "allocation": allocation}
    found = jaxmoe.plan(tmp_path / "model", "svd", **options)
    # The cheapest step, of the smallest map, is below a thousandth of what is replaced.
    assert 0.4 <= found.achieved["touched"] < 0.402
    assert found.requested.targets == EVERYTHING
    kept = {}
    for layer in found.layers:
        for name, own in layer.projections.items():
            kept.setdefault(name, []).append(own.kept)
    if allocation == "uniform":
        # Equal maps keep alike, up to a rank, and those of attention more than gate and up.
        assert all(max(own) - min(own) < 0.08 for own in kept.values())
        assert min(kept["attention.output"]) > max(kept["shared.up"])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("mobe", {"targets": "experts,attention"}, "mobe works on the experts alone; others take svd"),
        ("reap", {"targets": "attention"}, "reap works on the experts alone; others take svd"),
        ("svd", {"targets": "experts,mlp"}, "targets 'mlp': give one or more of experts, attention, shared, dense"),
        (
            "svd",
            {"targets": "shared,dense", "of": "touched"},
            "targets shared, dense: this model has experts, attention",
        ),
        ("svd", {"targets": "experts,attention", "of": "experts"}, "--of experts: a ratio of the routed experts"),
        ("svd", {"targets": "attention", "ratio": 0.9}, "out of reach .* targets attention: it can remove"),
        ("reap+svd", {"targets": "experts,attention"}, "share a budget of the routed experts; give one of them alone"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_runs(method, options, message, tmp_path):
    save_tiny("mixtral", tmp_path / "model")
    options = {"ratio": 0.3, "of": "model", **options}
    for act in (jaxmoe.plan, lambda source, *given, **own: jaxmoe.compress(source, tmp_path / "small", *given, **own)):
        with pytest.raises(JaxmoeError, match=message):
            act(tmp_path / "model", method, **options)
    assert not list(tmp_path.glob("small*"))


def test_models_that_jaxmoe_does_not_run_have_experts_alone(tmp_path):
    save_tiny("jamba", tmp_path / "model")
    with pytest.raises(JaxmoeError, match=r"of this model only the experts can be targets.*jamba"):
        jaxmoe.plan(tmp_path / "model", "svd", ratio=0.3, of="model", targets="experts,attention")


def test_targets_stand_in_recipe_files(tmp_path):
    save_tiny("mixtral", tmp_path / "model")
    (tmp_path / "own.yaml").write_text("{method: svd, ratio: 0.3, of: model, targets: [experts, attention]}")
    done = call("compress", tmp_path / "model", tmp_path / "one", "--recipe", tmp_path / "own.yaml")
    assert done.returncode == 0, done.stderr
    again = call("compress", tmp_path / "model", tmp_path / "two", "--recipe", tmp_path / "one" / "recipe.yaml")
    assert again.returncode == 0, again.stderr
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")


def test_factors_of_every_map_are_evaluated_and_trained(tmp_path):
    options = {"ratio": 0.4, "of": "model", "targets": "experts,attention"}
    jaxmoe.compress(short_demo(), tmp_path / "small", "svd", **options)
    measured = jaxmoe.evaluate(tmp_path / "small", text=demo_texts()[0], sequences=2, length=32, generate=0)
    assert np.isfinite(measured.as_json()["geometric_mean_perplexity"])
    training = ("--steps", 2, "--rows", 2, "--length", 32, "--learning-rate", 0.01, "--train", "factors")
    arguments = ("--teacher", short_demo(), "--text", demo_texts()[0], *training)
    done = call("recover", tmp_path / "small", tmp_path / "trained", *arguments)
    assert done.returncode == 0, done.stderr
    before, after = (CompressedCheckpoint.open(tmp_path / name) for name in ("small", "trained"))
    for name in before.linears:
        assert all(
            not np.array_equal(a, b) for a, b in zip(*(own.linear(name).tensors().values() for own in (before, after)))
        )
    close(torch_logits(tmp_path / "trained"), logits(tmp_path / "trained"), tolerance=1e-4)
