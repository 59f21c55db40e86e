"""Quantised matrices that no step replaces stay as they are, and what reads the result finds their values."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint.test_packed_integers import pack

import jaxmoe
from jaxmoe.checkpoint import Checkpoint, Planned, write_tensors
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.files import read_weights
from jaxmoe.checkpoint.quantization import leaving_out
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.export.dense import densify
from jaxmoe.export.trained import write_trained

BFLOAT16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(7)


def fp8(name, weight):
    scale = np.maximum(np.abs(weight).max(keepdims=True) / 448, 1e-6).astype("float32")
    codes = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, (codes.astype("float32") * scale).astype(BFLOAT16)


def int4(name, weight):
    scale = (np.abs(weight).max(1, keepdims=True) / 7.5).astype(BFLOAT16)
    codes = np.clip(np.round(weight / scale.astype("float32")) + 8, 0, 15).astype(int)
    parts = {f"{name}_packed": pack(codes, 4), f"{name}_scale": scale, f"{name}_shape": np.array(weight.shape)}
    return parts, ((codes - 8) * scale.astype("float32")).astype(BFLOAT16)


SETTINGS = {
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
            }
        },
    },
}


def write(folder, arrays, config):
    folder.mkdir()
    planned = [Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()]
    write_tensors(folder / "model.safetensors", planned)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["fp8", "int4"])
def sources(request, tiny, tmp_path_factory):
    """Return a quantised checkpoint, and one of the very same numbers in bfloat16."""
    pytest.importorskip("accelerate")
    pytest.importorskip("compressed_tensors")
    source = Checkpoint.open(tiny("qwen3_moe", "bfloat16"))
    arrays, exact = {}, {}
    for name, entry in source.tensors.items():
        arrays[name] = exact[name] = entry.read()
        if name.endswith("_proj.weight"):
            del arrays[name]
            parts, exact[name] = {"fp8": fp8, "int4": int4}[request.param](name, entry.read().astype("float32"))
            arrays |= parts
    root = tmp_path_factory.mktemp(request.param)
    settings = {"quantization_config": SETTINGS[request.param]}
    return write(root / "few", arrays, {**source.config, **settings}), write(root / "plain", exact, source.config)


@pytest.fixture(scope="module")
def factored(sources, tmp_path_factory):
    """Return what a method makes of both."""
    root = tmp_path_factory.mktemp("factored")
    for name, source in zip(("few", "plain"), sources, strict=True):
        jaxmoe.compress(source, root / name, "svd", ratio=0.4, export="factored")
    return root / "few", root / "plain"


def test_they_are_copied_as_they_are(sources, factored):
    source, found = Checkpoint.open(sources[0]), CompressedCheckpoint.open(factored[0])
    kept = [part for name, m in source.matrices.items() if ".self_attn." in name for part in m.parts]
    assert {len(m.parts) for name, m in found.matrices.items() if name.endswith("q_proj.weight")} <= {2, 3}
    for part in kept:
        assert found.tensors[part.name].dtype == part.dtype
        assert found.tensors[part.name].read().tobytes() == part.read().tobytes()
    plain = CompressedCheckpoint.open(factored[1])
    assert found.bytes < plain.bytes
    assert found.parameters == plain.parameters
    details = [o["detail"] for o in json.loads((factored[0] / "report.json").read_text())["outcomes"]]
    assert any("stay as they were quantised" in detail for detail in details)


def test_the_same_numbers_run(factored):
    few, plain = (StoredModel(folder).layer(1) for folder in factored)
    assert few.keys() == plain.keys()
    for name, array in few.items():
        for one, other in zip(jax.tree.leaves(array), jax.tree.leaves(plain[name]), strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_transformers_runs_them(factored):
    torch = pytest.importorskip("torch")
    from tiny_models import load_tiny

    few, plain = (load_tiny(folder, trust_remote_code=True, dtype="bfloat16") for folder in factored)
    with torch.no_grad():
        one, other = (model(torch.arange(3, 35)[None]).logits for model in (few, plain))
    assert (one == other).all()


def test_dense_is_without_quantisation(factored, tmp_path):
    for folder in factored:
        densify(folder, tmp_path / folder.name)
    few, plain = (Checkpoint.open(tmp_path / folder.name) for folder in factored)
    assert few.config == plain.config
    assert few.tensors.keys() == plain.tensors.keys()
    for name, entry in few.tensors.items():
        assert entry.read().tobytes() == plain.tensors[name].read().tobytes()


def test_a_dense_export_says_what_becomes_of_them(sources, tmp_path):
    report = jaxmoe.compress(sources[0], tmp_path / "dense", "svd", ratio=0.4, export="dense")
    assert any("are written in bfloat16: the form dense" in outcome.detail for outcome in report.outcomes)
    assert {entry.dtype for entry in read_weights(tmp_path / "dense").tensors.values()} == {"BF16"}
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_maps_that_are_replaced_are_left_out(sources, tmp_path):
    """Of what stays, the config leaves out the experts and the maps that have other forms now."""
    options = {"ratio": 0.4, "of": "touched", "targets": "experts,attention", "export": "factored"}
    jaxmoe.compress(sources[0], tmp_path / "all", "svd", **options)
    assert not any(len(m.parts) > 1 for m in CompressedCheckpoint.open(tmp_path / "all").matrices.values())
    assert "quantization_config" not in json.loads((tmp_path / "all" / "config.json").read_text())


def test_what_is_trained_is_without_quantisation(factored, tmp_path):
    """One map of attention that was trained; the others stay as they are."""
    model = StoredModel(factored[0])
    parameters = model.parameters()
    query = parameters["layers"][1]["attention.query.weight"]
    parameters["layers"][1]["attention.query.weight"] = 2 * query
    write_trained(model, parameters, ["layers.1.attention.query.weight"], tmp_path)
    found = StoredModel(tmp_path)
    assert len(found.matrices["model.layers.1.self_attn.q_proj.weight"].parts) == 1
    assert len(found.matrices["model.layers.0.self_attn.q_proj.weight"].parts) > 1
    np.testing.assert_array_equal(found.layer(1)["attention.query.weight"], 2 * np.asarray(query, np.float32))
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    left_out = settings.get("modules_to_not_convert") or settings["ignore"]
    assert any("1" in name and "q_proj" in name for name in left_out)


def test_modules_are_left_out_by_their_whole_names():
    part = Planned("q_proj.weight_packed", "int32", (2, 1), lambda: None, stands_for=16)
    settings = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
    config = leaving_out({}, settings, [part], ["model.layers.1.mlp.experts"])
    first, pattern = config["quantization_config"]["ignore"]
    assert first == "lm_head"
    for name, left in (("model.layers.1.mlp.experts.0.up_proj", True), ("model.layers.1.mlp.experts_norm", False)):
        assert (re.match(pattern.removeprefix("re:"), name) is not None) is left
