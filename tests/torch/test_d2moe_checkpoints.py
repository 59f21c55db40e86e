"""D²-MoE end to end: calibrated, compressed by the command line, loaded in transformers, converted back to dense."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from program import call, checksums
from tiny_models import EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY, load_tiny, save_tiny
from transformers import AutoModelForCausalLM

from jaxmoe import StoredModel
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.texts import Windows

torch.set_num_threads(1)
TOKENS = torch.randint(3, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(7))
# Experts apart on disk and no shared ones, in one layer; a dense layer, shared experts, and choices by groups.
FAMILIES = {"mixtral": {"num_hidden_layers": 1}, "deepseek_v3": {}}
RATIO = 0.4


class Recipe(NamedTuple):
    """Options of the command line, and the numbers that one more rank stores in the dearest target."""

    options: tuple[str, ...]
    step: int


PAPER = Recipe(("--setting", "paper", "--set", "dynamic=0"), EXPERTS * (HIDDEN + INTERMEDIATE))
IMPROVED = Recipe(("--set", "base=always"), 2 * INTERMEDIATE + HIDDEN)


@pytest.fixture(scope="module", params=FAMILIES)
def calibrated(request, tmp_path_factory):
    """Return the folders of a tiny model and of its statistics, gradients included."""
    root = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, root / "model", **FAMILIES[request.param])
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (6, 16)).astype(np.int32)
    counted = np.ones(ids.shape, bool)
    text = Windows(name="text", fingerprint="random", ids=ids, counted=counted, left_out=0)
    calibrate_windows(StoredModel(root / "model"), [text], root / "statistics", gradients="sequence")
    return root / "model", root / "statistics"


def jaxmoe(*arguments) -> dict:
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compress(calibrated, output, recipe: Recipe, *options):
    source, statistics = calibrated
    method = ("--method", "d2moe", "--ratio", RATIO, "--statistics", statistics)
    return jaxmoe("compress", source, output, *method, *recipe.options, *options)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def difference(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("recipe", [PAPER, IMPROVED], ids=["paper", "improved"])
def test_files_hold_what_was_planned_and_pytorch_computes_it(calibrated, tmp_path, recipe):
    report = compress(calibrated, tmp_path / "small", recipe)
    dense = EXPERTS * 3 * HIDDEN * INTERMEDIATE * len(report["layers"])
    assert 0 <= (report["achieved"]["experts"] - RATIO) * dense < recipe.step
    entries = read_tensors(tmp_path / "small").values()
    assert sum(entry.numbers for entry in entries) == report["parameters"]["after"] == report["stored"]["parameters"]
    assert sum(entry.bytes for entry in entries) == report["bytes"]["after"]
    for layer in report["layers"]:
        for record in layer["projections"].values():
            assert record["terms"][0]["kind"] == "shared"
            assert 0 < record["weighted_error"] < 1

    compress(calibrated, tmp_path / "dense", recipe, "--export", "dense")
    jaxmoe("convert", tmp_path / "small", tmp_path / "densified", "--to", "dense")
    assert checksums(tmp_path / "densified") == checksums(tmp_path / "dense")

    small, twin = load(tmp_path / "small"), load_tiny(tmp_path / "dense")
    assert type(small).__name__.startswith("Factored")
    assert difference(logits(small), logits(twin)) < 2e-5
    assert difference(logits(small), logits(load_tiny(calibrated[0]))) > 0.02, "truncation must move the logits"
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small.generate(TOKENS, **options), twin.generate(TOKENS, **options))


def test_what_every_batch_masks_stays_in_the_files(calibrated, tmp_path):
    """Only the stored half of the sparsity is saved, and the outputs are no longer those of the stored matrices."""
    still = compress(calibrated, tmp_path / "still", PAPER, "--set", "sparsity=0.2")
    moving = compress(calibrated, tmp_path / "moving", PAPER, "--set", "sparsity=0.4", "--set", "dynamic=0.5")
    for name in ("parameters", "bytes", "achieved"):
        assert moving[name] == still[name]
    said = [outcome for outcome in moving["outcomes"] if outcome["kind"] == "published_size"]
    assert len(said) == 3 * len(moving["layers"])
    jaxmoe("convert", tmp_path / "moving", tmp_path / "dense", "--to", "dense")
    model = load(tmp_path / "moving")
    assert 1e-3 < difference(logits(model), logits(load_tiny(tmp_path / "dense"))) < 1
    assert difference(logits(load(tmp_path / "still")), logits(load_tiny(tmp_path / "dense"))) < 2e-5
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 24)
