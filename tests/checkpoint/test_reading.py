"""Every architecture: what is read equals what transformers holds in memory, and what is written equals the source."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import EXPERTS, FAMILIES, HIDDEN, INTERMEDIATE, build, load_tiny

from jaxmoe.checkpoint import Checkpoint, Planned, read_header, write_tensors
from jaxmoe.checkpoint.families import FAMILIES as RECORDS
from jaxmoe.checkpoint.families import decoder_config, decoder_spec, find_family, lookup
from jaxmoe.errors import JaxmoeError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

SHARED = Path(__file__).parents[2].parent / "shared" / "checkpoints"
TRAINED = sorted(path.parent for path in SHARED.glob("*/config.json"))


def in_memory(module, family):
    """Return gate, up and down, `[expert, out, in]`, from a transformers module of experts."""
    if family == "dbrx":
        gate, up, down = (getattr(module, name).view(EXPERTS, INTERMEDIATE, HIDDEN) for name in ("w1", "v1", "w2"))
        return {"gate": gate, "up": up, "down": down.transpose(1, 2)}
    if family == "jetmoe":
        both, down = module.input_linear.weight, module.output_linear.weight
        return {"gate": both[:, :INTERMEDIATE], "up": both[:, INTERMEDIATE:], "down": down}
    if family == "nemotron_h":
        return {"up": module.up_proj, "down": module.down_proj}
    if family == "gpt_oss":
        both = module.gate_up_proj
        return {
            "gate": both[:, :, 0::2].transpose(1, 2),
            "up": both[:, :, 1::2].transpose(1, 2),
            "down": module.down_proj.transpose(1, 2),
        }
    if family == "llama4_text":
        gate, up = module.gate_up_proj.transpose(1, 2).chunk(2, dim=1)
        return {"gate": gate, "up": up, "down": module.down_proj.transpose(1, 2)}
    gate, up = module.gate_up_proj.chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": module.down_proj}


def experts_in_memory(model, family):
    """Return the paths of the modules that hold routed experts, found without jaxmoe."""
    attribute = {"dbrx": "w1", "nemotron_h": "up_proj", "jetmoe": "input_linear"}.get(family, "gate_up_proj")
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, attribute)
        and not isinstance(getattr(module, attribute), torch.nn.Linear)
        and ".self_attention" not in name
    ]


def as_numpy(tensor):
    return tensor.detach().float().numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_equals_transformers(family, dtype, tiny):
    checkpoint = Checkpoint.open(tiny(family, dtype))
    model = load_tiny(tiny(family, dtype))
    assert [layer.module for layer in checkpoint.layers] == experts_in_memory(model, family)
    assert checkpoint.family is RECORDS[family]
    assert not checkpoint.notes
    assert not checkpoint.quantized
    assert checkpoint.parameters == sum(entry.numbers for entry in checkpoint.tensors.values())
    for layer in checkpoint.layers:
        assert layer.shape[:3] == (EXPERTS, HIDDEN, INTERMEDIATE)
        assert layer.dtype.name == dtype
        expected = in_memory(model.get_submodule(layer.module), family)
        assert set(expected) == set(layer.shape.projections)
        for name, values in expected.items():
            found = checkpoint.projection(layer, name)
            assert found.dtype.name == dtype
            np.testing.assert_array_equal(found.astype(np.float32), as_numpy(values))
            part = checkpoint.projection(layer, name, slice(2, 5))
            np.testing.assert_array_equal(part.astype(np.float32), as_numpy(values[2:5]))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_the_tiny_model(family, tiny):
    # Tied or persistent buffers would count differently; these models have parameters and small buffers only.
    checkpoint = Checkpoint.open(tiny(family))
    model = build(family)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in model.state_dict().values())


def rewrite(checkpoint, path):
    """Write all of a checkpoint's tensors as a dense export does, from its own matrices."""
    planned = checkpoint.copied()
    for layer in checkpoint.layers:
        planned += checkpoint.dense_tensors(layer, lambda name, layer=layer: checkpoint.projection(layer, name))
    write_tensors(path, planned)


def assert_same_bytes(source, path):
    from safetensors import safe_open

    with safe_open(path, "pt") as written, safe_open(source / "model.safetensors", "pt") as original:
        assert set(written.keys()) == set(original.keys())
        for name in original.keys():  # noqa: SIM118
            ours, theirs = written.get_tensor(name), original.get_tensor(name)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_round_trip_gives_the_same_tensors(family, tiny, tmp_path):
    source = tiny(family, "bfloat16")
    checkpoint = Checkpoint.open(source)
    rewrite(checkpoint, tmp_path / "model.safetensors")
    assert_same_bytes(source, tmp_path / "model.safetensors")
    assert checkpoint.dense_config() == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "lfm2_moe", "granitemoe"])
def test_fused_names_of_any_family(family, tiny, tmp_path):
    model = load_tiny(tiny(family))
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused, usual = Checkpoint.open(tmp_path / "fused"), Checkpoint.open(tiny(family))
    assert not any("{expert}" in stack.name for layer in fused.layers for stack in layer.layout)
    for ours, theirs in zip(fused.layers, usual.layers, strict=True):
        assert ours.module == theirs.module
        assert ours.shape == theirs.shape
        for name in theirs.shape.projections:
            np.testing.assert_array_equal(fused.projection(ours, name), usual.projection(theirs, name))
    rewrite(fused, tmp_path / "model.safetensors")
    assert_same_bytes(tmp_path / "fused", tmp_path / "model.safetensors")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "some_new_moe"])
def test_shape_decides_orientation_where_the_family_does_not(model_type, transposed, tiny, tmp_path):
    usual = Checkpoint.open(tiny("qwen3_moe"))
    planned = usual.copied()
    for layer in usual.layers:
        both = np.concatenate([usual.projection(layer, name) for name in ("gate", "up")], axis=1)
        for name, values in (("gate_up_proj", both), ("down_proj", usual.projection(layer, "down"))):
            values = values.swapaxes(1, 2) if transposed else values
            planned.append(Planned(f"{layer.module}.{name}", "float32", values.shape, lambda values=values: values))
    write_tensors(tmp_path / "model.safetensors", planned)
    config = {**usual.config, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    fused = Checkpoint.open(tmp_path)
    assert {stack.transposed for layer in fused.layers for stack in layer.layout} == {transposed}
    for ours, theirs in zip(fused.layers, usual.layers, strict=True):
        for name in theirs.shape.projections:
            np.testing.assert_array_equal(fused.projection(ours, name), usual.projection(theirs, name))
    assert bool(fused.notes) == (model_type == "some_new_moe")


def test_ling_2_is_told_from_ling_1():
    """Both are published as `bailing_moe`; the second chooses experts by sigmoids with a bias, in groups."""
    first, second = (
        find_family({"model_type": "bailing_moe"}),
        find_family({"model_type": "bailing_moe", "score_function": "sigmoid"}),
    )
    assert first is not None
    assert second is not None
    assert (first.routing, first.bias) == ("softmax", "")
    assert (second.routing, second.bias) == ("deepseek_v3", "mlp.gate.expert_bias")
    with pytest.raises(JaxmoeError, match="this is Ling 2"):
        decoder_spec({"model_type": "bailing_moe", "score_function": "sigmoid"}, {})


def test_unknown_architecture_is_read_and_says_so(tiny, tmp_path):
    folder = shutil.copytree(tiny("mixtral"), tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "brand_new_moe"}))
    ours, usual = Checkpoint.open(folder), Checkpoint.open(tiny("mixtral"))
    assert ours.family is None
    assert ours.layers[0].module == "model.layers.0.block_sparse_moe.experts"
    (note,) = ours.notes
    assert "brand_new_moe" in note
    assert "Unknown: how it routes" in note
    np.testing.assert_array_equal(ours.projection(ours.layers[1], "down"), usual.projection(usual.layers[1], "down"))


def with_tensors(source, folder, extra, config=None):
    """Copy a checkpoint with further tensors and another config."""
    checkpoint = Checkpoint.open(source)
    planned = [Planned(n, e.dtype, e.shape, e.read) for n, e in checkpoint.tensors.items()]
    planned += [Planned(n, x.dtype, x.shape, lambda x=x: x) for n, x in extra.items()]
    folder.mkdir()
    write_tensors(folder / "model.safetensors", planned)
    (folder / "config.json").write_text(json.dumps(config or dict(checkpoint.config)))
    return folder


def prediction_layer(prefix):
    rng = np.random.default_rng(0)
    experts = {
        f"{prefix}mlp.experts.{e}.{name}_proj.weight": rng.normal(
            size=(HIDDEN, INTERMEDIATE) if name == "down" else (INTERMEDIATE, HIDDEN)
        ).astype("float32")
        for e in range(EXPERTS)
        for name in ("gate", "up", "down")
    }
    return {**experts, f"{prefix}eh_proj.weight": np.ones((HIDDEN, 2 * HIDDEN), "float32")}


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("deepseek_v3", "model.layers.3."), ("qwen3_next", "mtp.layers.0."), ("ernie4_5_moe", "model.mtp_block.0.")],
)
def test_multi_token_prediction_is_copied(family, prefix, tiny, tmp_path):
    extra = prediction_layer(prefix)
    checkpoint = Checkpoint.open(with_tensors(tiny(family), tmp_path / "mtp", extra))
    plain = Checkpoint.open(tiny(family))
    assert set(checkpoint.mtp) == set(extra)
    assert [layer.index for layer in checkpoint.layers] == [layer.index for layer in plain.layers]
    (note,) = checkpoint.notes
    assert f"{len(extra)} tensors of multi-token prediction" in note
    copied = {planned.name: planned for planned in checkpoint.copied()}
    for name, values in extra.items():
        np.testing.assert_array_equal(copied[name].produce(), values)


def test_several_modalities_nest_the_decoder(tiny, tmp_path):
    plain = Checkpoint.open(tiny("qwen3_5_moe_text"))
    folder = tmp_path / "composite"
    folder.mkdir()
    planned = [
        Planned(name.replace("model.", "model.language_model.", 1), entry.dtype, entry.shape, entry.read)
        for name, entry in plain.tensors.items()
    ]
    vision = np.ones((4, 4), "float32")
    planned.append(Planned("model.visual.blocks.7.mlp.linear_fc1.weight", "float32", (4, 4), lambda: vision))
    write_tensors(folder / "model.safetensors", planned)
    config = {"model_type": "qwen3_5_moe", "text_config": dict(plain.config), "vision_config": {"depth": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(folder)
    assert [layer.index for layer in checkpoint.layers] == [0, 1]
    assert checkpoint.layers[0].module == "model.language_model.layers.0.mlp.experts"
    assert not checkpoint.mtp
    np.testing.assert_array_equal(
        checkpoint.projection(checkpoint.layers[1], "up"), plain.projection(plain.layers[1], "up")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_records_name_what_the_checkpoint_has(family, tiny):
    checkpoint = Checkpoint.open(tiny(family))
    record, decoder = RECORDS[family], decoder_config(checkpoint.config)
    assert lookup(decoder, record.experts) == EXPERTS
    assert lookup(decoder, record.top_k) == (1 if family == "llama4_text" else 2)
    assert lookup(decoder, record.intermediate) == INTERMEDIATE
    for layer in checkpoint.layers:
        prefix = layer.names[0].split(f"{layer.index}.", 1)[0] + f"{layer.index}."
        router = checkpoint.tensors[prefix + record.router]
        assert router.shape == (EXPERTS, HIDDEN)
        if record.bias:
            assert checkpoint.tensors[prefix + record.bias].numbers == EXPERTS
        if record.shared:
            has_shared = [name for name in checkpoint.tensors if name.startswith(f"{prefix}{record.shared}.")]
            assert has_shared or family == "granitemoe"


@pytest.mark.skipif(not TRAINED, reason="the trained checkpoints are not here")
@pytest.mark.parametrize("folder", TRAINED, ids=lambda path: path.name)
def test_trained_checkpoints(folder, tmp_path):
    checkpoint = Checkpoint.open(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for layer in checkpoint.layers:
        for name, values in in_memory(model.get_submodule(layer.module), checkpoint.model_type).items():
            np.testing.assert_array_equal(checkpoint.projection(layer, name).astype("float32"), as_numpy(values))
    rewrite(checkpoint, tmp_path / "model.safetensors")
    assert_same_bytes(folder, tmp_path / "model.safetensors")
    assert read_header(tmp_path / "model.safetensors").keys() == checkpoint.tensors.keys()
