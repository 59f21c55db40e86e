"""Every architecture end to end: compress, load in PyTorch, and compare with the dense export and the original."""

from functools import partial

import pytest
from planned import compress, make_plan
from program import checksums
from tiny_models import FAMILIES, save_tiny

from jaxmoe import Checkpoint, densify, inspect, methods
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.families import exports
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.compression.factor import assemble
from jaxmoe.compression.plan import PlannedLayer
from jaxmoe.compression.step import Found
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, LowRank

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUICK = {"svd": {}, "mobe": {"steps": 40}}
FACTORED = [family for family in FAMILIES if "factored" in exports(family)]
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


@pytest.mark.parametrize("method", ["svd", pytest.param("mobe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FACTORED)
def test_factored_equals_dense(source, tmp_path, family, method):
    original = source(family)
    report = run(original, tmp_path / "small", method)
    assert 0 <= report["achieved"]["experts"] - 0.4 < 0.03
    entries = read_tensors(tmp_path / "small").values()
    assert sum(entry.numbers for entry in entries) == report["parameters"]["after"] == report["stored"]["parameters"]
    assert sum(entry.bytes for entry in entries) == report["bytes"]["after"]
    assert CompressedCheckpoint.open(tmp_path / "small").parameters == report["parameters"]["after"]

    small = load(tmp_path / "small", trust_remote_code=True)
    run(original, tmp_path / "dense", method, export="dense")
    densify(tmp_path / "small", tmp_path / "densified")
    assert checksums(tmp_path / "densified") == checksums(tmp_path / "dense")
    dense = load(stock(tmp_path / "dense", family))
    ours = logits(small)
    assert difference(ours, logits(dense)) < 2e-5
    assert difference(ours, logits(load(stock(original, family)))) > 0.02, "truncation must move the logits"

    prompt = torch.tensor([[5, 17, 90, 33]])
    options = {"max_new_tokens": 4, "do_sample": False}
    assert small.generate(prompt, **options).tolist() == dense.generate(prompt, **options).tolist()
    small.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", trust_remote_code=True)
    kept, reloaded = small.state_dict(), again.state_dict()
    assert all(torch.equal(kept[name], reloaded.pop(name)) for name in kept)
    assert not reloaded


def stock(folder, family):
    """Return the folder; Kimi-K2 is DeepSeek-V3 under a name that stock transformers does not know."""
    if family == "kimi_k2":
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"kimi_k2"', '"deepseek_v3"'))
    return folder


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
