"""Experts with biases that lie one by one: read as transformers' own stacks, and written so that it loads them."""

import re

import numpy as np
import pytest
from planned import compress, make_plan, run
from safetensors.numpy import load_file, save_file
from tiny_models import load_tiny, save_tiny

from jaxmoe import Checkpoint, densify, methods
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.trained import write_trained
from jaxmoe.recovery.trainable import merge, names, split
from jaxmoe.texts import Windows

torch = pytest.importorskip("torch")
AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM


def one_by_one(stacked, apart, *, joined=False, change=lambda tensors: None):
    """Write a gpt-oss checkpoint with a linear map for every expert, as programs do that quantise them."""
    apart.mkdir()
    (apart / "config.json").write_bytes((stacked / "config.json").read_bytes())
    tensors = {}
    for name, array in load_file(stacked / "model.safetensors").items():
        match = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj(_bias)?", name)
        if match is None:
            tensors[name] = array
            continue
        module, projection, bias = match.groups()
        for expert, own in enumerate(array):
            matrix = own if bias else own.T
            leaf = "bias" if bias else "weight"
            parts = {"down": matrix} if projection == "down" else {"gate": matrix[0::2], "up": matrix[1::2]}
            if joined and projection == "gate_up":
                parts = {"gate_up": np.concatenate([matrix[0::2], matrix[1::2]])}
            for part, values in parts.items():
                tensors[f"{module}.{expert}.{part}_proj.{leaf}"] = np.ascontiguousarray(values)
    change(tensors)
    save_file(tensors, apart / "model.safetensors", metadata={"format": "pt"})
    return apart


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("biases") / "stacked"
    save_tiny("gpt_oss", folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(42).reshape(2, 21) + 3).logits


@pytest.mark.parametrize("joined", [False, True])
def test_read_as_the_stacks(stacked, tmp_path, joined):
    theirs, ours = StoredModel(stacked), StoredModel(one_by_one(stacked, tmp_path / "apart", joined=joined))
    for index in range(2):
        expected, found = theirs.layer(index), ours.layer(index)
        for name in ("experts.gate.bias", "experts.up.bias", "experts.down.bias"):
            np.testing.assert_array_equal(found[name], expected[name])
        for projection in ("gate", "up", "down"):
            one, other = (np.asarray(x["experts"].materialize(projection)) for x in (found, expected))
            np.testing.assert_array_equal(one, other)
    source = ours.checkpoint
    assert not source.quantized
    assert (source.parameters, source.bytes) == (theirs.checkpoint.parameters, theirs.checkpoint.bytes)
    assert any("one by one" in note for note in source.notes)


def test_every_export_is_what_the_stacks_give(stacked, tmp_path):
    outputs = {}
    for name, source in (("stacked", stacked), ("apart", one_by_one(stacked, tmp_path / "source"))):
        opened, method = Checkpoint.open(source), methods.get("svd")
        plan = make_plan(opened, method, method.settings(), ratio=0.4)
        for export in ("factored", "dense"):
            compress(opened, tmp_path / f"{name}-{export}", plan, export=export)
        densify(tmp_path / f"{name}-factored", tmp_path / f"{name}-densified")
        for form in ("factored", "dense", "densified"):
            found = AutoModelForCausalLM.from_pretrained(
                tmp_path / f"{name}-{form}", trust_remote_code=True, output_loading_info=True
            )
            model, info = found
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            outputs[name, form] = logits(model)
    for form in ("factored", "dense", "densified"):
        assert torch.equal(outputs["apart", form], outputs["stacked", form])
    assert torch.equal(outputs["apart", "dense"], outputs["apart", "densified"])
    moved = outputs["apart", "dense"] - logits(load_tiny(stacked))
    assert float(moved.norm() / outputs["apart", "dense"].norm()) > 0.02


EXPERT = "model.layers.1.mlp.experts.3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERT}.up_proj.bias"), "there is none for up of expert 3"),
        (lambda t: t.update({f"{EXPERT}.down_proj.bias": np.zeros(3, "float32")}), r"they differ: F32 \[3\]; F32"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.down_proj_bias": np.zeros((2, 2), "float32")}),
            "there twice",
        ),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name and "up_proj.bias" in name], "gate alone"),
    ],
)
def test_biases_that_do_not_fit_are_named(stacked, tmp_path, change, message):
    with pytest.raises(JaxmoeError, match=rf"model\.layers\.1\.mlp\.experts\..*{message}"):
        Checkpoint.open(one_by_one(stacked, tmp_path / "apart", change=change))


@pytest.mark.parametrize(("name", "multiple"), [("frequency", 1), ("camera", 8)])
def test_slimmed_as_the_stacks_are(stacked, tmp_path, name, multiple):
    statistics = tmp_path / "statistics"
    ids = np.random.default_rng(0).integers(3, 100, (4, 16)).astype(np.int32)
    text = Windows(name="text", fingerprint="x", ids=ids, counted=np.ones(ids.shape, bool), left_out=0)
    calibrate_windows(StoredModel(stacked), [text], statistics, tokenizer=None)
    outputs = []
    for source in (stacked, one_by_one(stacked, tmp_path / "apart")):
        folder = tmp_path / f"{source.name}-slim"
        options = {"settings": {"multiple": multiple}, "statistics": Statistics.open(statistics)}
        run(Checkpoint.open(source), folder, name, ratio=0.25, **options)
        outputs.append(logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert torch.equal(*outputs)


def test_recovered_as_the_stacks_are(stacked, tmp_path):
    held = {}
    for source in (stacked, one_by_one(stacked, tmp_path / "apart")):
        model, folder = StoredModel(source), tmp_path / f"{source.name}-trained"
        folder.mkdir()
        parameters = model.parameters()
        chosen = [name for name in names(parameters) if "experts" in name]
        changed = {name: 1.5 * array for name, array in split(parameters, chosen).items()}
        write_trained(model, merge(parameters, changed), chosen, folder)
        held[source.name] = {name: entry.read() for name, entry in read_tensors(folder).items()}
    assert held["apart"].keys() == held["stacked"].keys()
    for name, array in held["stacked"].items():
        np.testing.assert_array_equal(held["apart"][name], array)
