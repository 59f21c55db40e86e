"""An architecture from outside the package, by one file: read, compressed, compared, and run in JAX and PyTorch."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from program import call

from jaxmoe import Checkpoint, StoredModel, inspect
from jaxmoe.checkpoint.families import FAMILIES, architecture, decoder_spec, exports, registry
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.cli.arguments import import_module
from jaxmoe.comparison import run as comparison
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.model import forward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import own_classes  # noqa: E402

FILE = Path(__file__).with_name("own_family.py")
IDS = np.arange(48).reshape(2, 24) * 7 % 120 + 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return the folder of a tiny model, with a tokenizer, whose config leaves out what has a default."""
    folder = tmp_path_factory.mktemp("own") / "source"
    config = own_classes.OwnConfig(
        vocab_size=json.loads((demo_checkpoint() / "config.json").read_text())["vocab_size"],
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        intermediate_size=56,
        max_position_embeddings=128,
    )
    model = own_classes.OwnForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.05 * noise if "norm" in name else 0.2 * noise)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_checkpoint() / file, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["score_scale"]
    (folder / "config.json").write_text(json.dumps({**config, "own_seed": 3, "own_form": 1}))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a text of a few hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(demo_texts()[0].read_text()[:1500])
    return path


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    FAMILIES.pop("own_moe", None)


@pytest.fixture
def registered():
    import_module(str(FILE))


def jaxmoe(*arguments) -> dict:
    """Run a command as with a process of its own, where nothing is registered yet, and return what it says."""
    FAMILIES.pop("own_moe", None)
    done = call("--import", FILE, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ours(folder):
    model = StoredModel(folder)
    return np.asarray(jax.jit(forward, static_argnames="spec")(jnp.asarray(IDS), model.parameters(), spec=model.spec))


def theirs(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return type(model), model(input_ids=torch.tensor(IDS), use_cache=False).logits.numpy()


def difference(one, other) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_unknown_without_the_file(source):
    with pytest.raises(JaxmoeError, match=r"unknown names near experts.*experts\.0\.wi\.weight"):
        Checkpoint.open(source)
    with pytest.raises(JaxmoeError, match="'own_moe': jaxmoe runs afmoe"):
        decoder_spec({"model_type": "own_moe"}, {})
    assert exports("own_moe") == ["dense"]


@pytest.mark.usefixtures("registered")
def test_the_record_is_what_is_read_by(source):
    found = inspect(source)
    assert (found["known"], found["exports"], found["routing"]) == (True, ["dense", "factored"], "softmax")
    assert [layer["module"] for layer in found["layers"]] == [f"model.layers.{index}.mlp.experts" for index in (0, 1)]
    model = StoredModel(source)
    assert model.spec.layers[0].attention.scale == 0.5
    assert model.pieces(1)["attention.query_norm.weight"].tensor == "model.blocks.1.self_attn.query_norm.weight"
    assert difference(ours(source), theirs(source)[1]) < 1e-5


@pytest.mark.usefixtures("registered")
def test_its_keys_are_checked(source):
    config, shapes = json.loads((source / "config.json").read_text()), StoredModel(source).shapes
    for change, message in (
        ({"score_scale": -1.0}, "score_scale = -1.0 is not a finite number above 0"),
        ({"own_form": 2}, r"does not know what own_form \(2\)"),
        ({"new_trick": 2}, r"does not know what new_trick \(2\)"),
    ):
        with pytest.raises(JaxmoeError, match=message):
            decoder_spec({**config, **change}, shapes)
    assert decoder_spec({**config, "score_scale": 0.25, "own_seed": 7}, shapes).layers[1].attention.scale == 0.25


def test_command_line_and_pytorch(source, text, tmp_path):
    assert jaxmoe("inspect", source)["known"]
    planned = jaxmoe("plan", source, "--method", "svd", "--ratio", 0.4)
    report = jaxmoe("compress", source, tmp_path / "small", "--method", "svd", "--ratio", 0.4)
    assert report["parameters"] == planned["parameters"]
    assert 0.4 <= report["achieved"]["experts"] < 0.43
    assert "jaxmoe --import own_family compress " in (tmp_path / "small" / "recipe.yaml").read_text()
    before, after = (jaxmoe("evaluate", folder, "--text", text) for folder in (source, tmp_path / "small"))
    assert 0 < abs(after["geometric_mean_perplexity"] / before["geometric_mean_perplexity"] - 1) < 1

    expected = ours(tmp_path / "small")
    assert difference(expected, ours(source)) > 0.02, "truncation must move the logits"
    kind, logits = theirs(tmp_path / "small", trust_remote_code=True)
    assert kind.__name__ == "FactoredOwnForCausalLM"
    assert kind.__module__.startswith("transformers_modules.")
    assert difference(logits, expected) < 1e-5
    from jaxmoe.torch import register

    register()
    kind, logits = theirs(tmp_path / "small")
    assert kind.__module__.startswith("jaxmoe.")
    assert difference(logits, expected) < 1e-5

    jaxmoe("convert", tmp_path / "small", tmp_path / "dense", "--to", "dense")
    assert read_tensors(tmp_path / "dense").keys() == read_tensors(source).keys()
    kind, logits = theirs(tmp_path / "dense")
    assert kind is own_classes.OwnForCausalLM
    assert difference(logits, expected) < 1e-5


def test_experts_are_removed_and_it_is_compared(source, text, tmp_path, monkeypatch):
    # Drawing and compiling again take seconds.
    monkeypatch.setattr(comparison, "page", lambda result: "")
    monkeypatch.setattr(comparison.jax, "clear_caches", lambda: None)
    result = jaxmoe(
        "compare",
        *(source, tmp_path / "report", "--methods", "frequency", "--ratios", 0.25, "--baselines", "none"),
        *("--set", "frequency:multiple=1", "--calibration-text", text, "--text", text),
        *("--sequences", 4, "--length", 64),
    )
    row = next(row for row in result["rows"] if row["method"] == "frequency")
    assert all(command.startswith("jaxmoe --import own_family ") for command in row["commands"])
    assert row["commands"][-1].startswith("jaxmoe --import own_family compress ")
    assert row["nats_lost"] != 0
    assert row["achieved"]["experts"] == 0.25


def test_an_installed_package_names_it(source, tmp_path, monkeypatch):
    shutil.copy(FILE, tmp_path / "installed_family.py")
    about = tmp_path / "own-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[jaxmoe.families]\nown = installed_family\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_load_installed", registry._load_installed.__wrapped__)
    assert inspect(source)["known"]
    assert architecture("own_moe").causal == "OwnForCausalLM"
    del sys.modules["installed_family"]


@pytest.mark.usefixtures("registered")
def test_a_name_is_taken_once():
    with pytest.raises(JaxmoeError, match="'own_moe' is registered already: choose another model_type"):
        import_module(str(FILE))
