"""Every architecture through the pipeline: what it writes, factored and dense, against what another writer writes."""

import json
from functools import partial

import numpy as np
import pytest
from factored_models import write_factored
from planned import compress, make_plan
from program import checksums
from tiny_models import FAMILIES, save_tiny

from jaxmoe import Checkpoint, densify, inspect, methods
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.families import exports
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.compression.factor_plan import assemble
from jaxmoe.compression.found import Found
from jaxmoe.compression.plan import PlannedLayer
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.remote_code import remote_code
from jaxmoe.factors import CompressedLayer, LowRank

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUICK = {"svd": {"setting": "paper"}, "mobe": {"steps": 5}}
FACTORED = [family for family in FAMILIES if "factored" in exports(family)]
LAYOUTS = ["qwen3_moe", "gpt_oss", "granitemoe", "nemotron_h"]
"""One for each way in which the matrices of a gated or ungated layer lie on disk."""
DENSE_ONLY = [family for family in FAMILIES if "factored" not in exports(family)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return the folder of a family's tiny model, saved once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(family):
        if family not in made:
            save_tiny(family, root / family)
            made[family] = root / family
        return made[family]

    return folder


def run(source, output, method, *, export="factored", ratio=0.4):
    checkpoint = Checkpoint.open(source)
    recipe = methods.get(method)
    plan = make_plan(checkpoint, recipe, recipe.settings(**QUICK[method]), ratio=ratio, of="experts")
    return compress(checkpoint, output, plan, export=export)


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options).eval()


def logits(model):
    ids = torch.arange(48).reshape(2, 24) * 7 % 120 + 3
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def difference(a, b):
    return float((a - b).norm() / b.norm())


def contents(folder):
    """Return every tensor of a checkpoint by name, as its dtype, shape and bytes."""
    return {
        name: (entry.dtype, entry.shape, np.ascontiguousarray(entry.read()).tobytes())
        for name, entry in read_tensors(folder).items()
    }


def forms(folder):
    """Return the dtype and shape of every tensor of a checkpoint by name."""
    return {name: (entry.dtype, entry.shape) for name, entry in read_tensors(folder).items()}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((name, "svd") for name in FACTORED),
        *(pytest.param(name, "mobe", marks=pytest.mark.slow) for name in LAYOUTS),
    ],
)
def test_compressed_is_what_another_writer_writes(source, tmp_path, family, method):
    """`test_architectures` runs in PyTorch what that writer writes, of every architecture."""
    original, small = source(family), tmp_path / "small"
    report = run(original, small, method)
    assert 0 <= report["achieved"]["experts"] - 0.4 < 0.03
    entries = read_tensors(small).values()
    assert sum(entry.numbers for entry in entries) == report["parameters"]["after"] == report["stored"]["parameters"]
    assert sum(entry.bytes for entry in entries) == report["bytes"]["after"]
    opened = CompressedCheckpoint.open(small)
    assert opened.parameters == report["parameters"]["after"]

    layers = {module: opened.layer(module) for module in opened.modules}
    config = write_factored(original, tmp_path / "other", layers, layouts=Checkpoint.open(original).layouts())
    assert config == json.loads((small / "config.json").read_text())
    assert contents(small) == contents(tmp_path / "other")
    assert all((small / name).read_text() == text for name, text in remote_code(config).items())

    densify(small, tmp_path / "dense")
    # As the original in all but numbers, it loads as the original does.
    assert forms(tmp_path / "dense") == forms(original)
    dense = Checkpoint.open(tmp_path / "dense")
    assert dense.config == Checkpoint.open(original).config
    for layer in dense.layers:
        for name in layer.shape.projections:
            expected = np.asarray(layers[layer.module].materialize(name))
            np.testing.assert_allclose(dense.projection(layer, name), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", LAYOUTS)
def test_written_dense_at_once_or_later(source, tmp_path, family):
    run(source(family), tmp_path / "small", "svd")
    densify(tmp_path / "small", tmp_path / "later")
    run(source(family), tmp_path / "once", "svd", export="dense")
    assert checksums(tmp_path / "later") == checksums(tmp_path / "once")


@pytest.mark.parametrize("family", DENSE_ONLY)
def test_others_are_read_and_written_dense(source, tmp_path, family):
    original = source(family)
    with pytest.raises(JaxmoeError, match="export it dense"):
        run(original, tmp_path / "small", "svd")
    assert not (tmp_path / "small").exists()
    run(original, tmp_path / "dense", "svd", export="dense")
    assert inspect(tmp_path / "dense")["exports"] == ["dense"]
    moved = difference(logits(load(tmp_path / "dense")), logits(load(original)))
    assert 0.02 < moved < 2


def test_full_rank_reproduces_the_original(source, tmp_path):
    checkpoint = Checkpoint.open(source("qwen3_moe"))
    recipe = methods.get("svd")

    def full(layer):
        sizes = layer.shape
        term = partial(LowRank.abstract, dtype=layer.dtype)
        terms = {t: (term(sizes.of(t), rank=min(sizes.of(t)[1:])),) for t in ("gate_up", "down")}
        return PlannedLayer(layer, CompressedLayer(terms=terms, sizes=sizes), ("gate_up", "down"))

    plan = assemble(Found.of(checkpoint), recipe, recipe.settings(), [full(x) for x in checkpoint.layers], requested={})
    compress(checkpoint, tmp_path / "full", plan)
    ours = logits(load(tmp_path / "full", trust_remote_code=True))
    assert difference(ours, logits(load(source("qwen3_moe")))) < 1e-5
