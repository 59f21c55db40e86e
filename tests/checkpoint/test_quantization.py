"""Dequantisation bit for bit against the reference implementations, and whole quantised checkpoints."""

import json

import ml_dtypes
import numpy as np
import pytest
from planned import compress, make_plan
from tiny_models import EXPERTS, HIDDEN, INTERMEDIATE

from jaxmoe import methods
from jaxmoe.checkpoint import Checkpoint, Planned, write_tensors
from jaxmoe.checkpoint.decoding import decode_fp8, decode_integers, decode_mxfp4
from jaxmoe.errors import JaxmoeError

torch = pytest.importorskip("torch")
BFLOAT16 = ml_dtypes.bfloat16
FP8 = ml_dtypes.float8_e4m3fn
RNG = np.random.default_rng(3)


def bits(values):
    if isinstance(values, torch.Tensor):
        return values.contiguous().view(torch.uint16).numpy()
    return np.ascontiguousarray(values).view(np.uint16)


def random_fp8(shape):
    codes = RNG.integers(0, 256, shape).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN has no place among weights
    return codes.view(FP8)


def test_fp8_equals_transformers():
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight, scale = random_fp8((256, 384)), RNG.lognormal(-8, 2, (2, 3)).astype("float32")
    reference = module.Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(weight.view(np.uint8)).view(torch.float8_e4m3fn), torch.from_numpy(scale), torch.bfloat16
    )
    np.testing.assert_array_equal(bits(decode_fp8(weight, scale)), bits(reference))


@pytest.mark.parametrize("shape", [(576, 512), (130, 200), (1, 1), (128, 129), (3, 130, 70)])
def test_fp8_blocks_at_the_edge_may_be_smaller(shape):
    weight = random_fp8(shape)
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scale = RNG.lognormal(-8, 2, grid).astype("float32")
    row, column = np.meshgrid(np.arange(shape[-2]) // 128, np.arange(shape[-1]) // 128, indexing="ij")
    expected = torch.from_numpy(weight.astype("float32") * scale[..., row, column]).to(torch.bfloat16)
    np.testing.assert_array_equal(bits(decode_fp8(weight, scale)), bits(expected))


def test_fp8_scales_may_be_powers_of_two():
    weight = random_fp8((128, 256))
    scale = np.array([[120, 131]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    expected = decode_fp8(weight, np.array([[2.0**-7, 2.0**4]], "float32"))
    np.testing.assert_array_equal(bits(decode_fp8(weight, scale)), bits(expected))


def test_mxfp4_equals_transformers():
    module = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = RNG.integers(0, 256, (3, 10, 4, 16)).astype(np.uint8)
    scales = RNG.integers(100, 140, (3, 10, 4)).astype(np.uint8)
    reference = module.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    found = decode_mxfp4(blocks, scales)
    assert found.shape == (3, 128, 10) == tuple(reference.shape)
    np.testing.assert_array_equal(bits(found), bits(reference))


def pack_int4(values):
    """Pack signed four-bit integers one by one, as the format's description says."""
    out, columns = values.shape
    packed = np.zeros((out, -(-columns // 8)), np.uint64)
    for column in range(columns):
        packed[:, column // 8] |= (values[:, column] + 8).astype(np.uint64) << np.uint64(4 * (column % 8))
    return packed.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("columns", [64, 96, 36])
def test_int4_equals_torch(columns):
    values = RNG.integers(-8, 8, (5, columns))
    groups = 1 if columns % 32 else columns // 32
    scale = RNG.lognormal(-4, 1, (5, groups)).astype(BFLOAT16)
    # compressed-tensors: the integers in the scales' dtype, times the scales repeated over their group.
    wide = torch.from_numpy(scale.astype("float32")).to(torch.bfloat16).repeat_interleave(columns // groups, dim=1)
    reference = torch.from_numpy(values).to(torch.bfloat16) * wide
    found = decode_integers(pack_int4(values), scale, 4, columns)
    np.testing.assert_array_equal(bits(found), bits(reference))


def write(folder, arrays, config):
    folder.mkdir(exist_ok=True)
    planned = [Planned(n, x.dtype, x.shape, lambda x=x: x) for n, x in arrays.items()]
    write_tensors(folder / "model.safetensors", planned)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8_checkpoint(source, folder, block=(16, 32)):
    """Quantise every matrix of a tiny model but its embeddings and routers; return the folder and the exact values."""
    arrays, exact = {}, {}
    for name, entry in source.tensors.items():
        values = entry.read()
        if not name.endswith("_proj.weight"):
            arrays[name] = exact[name] = values
            continue
        grid = [-(-size // b) for size, b in zip(values.shape, block)]
        # Smaller ones would take weights beyond the largest number of the format, which becomes NaN.
        scale = np.maximum(RNG.lognormal(-3, 1, grid), 0.01).astype("float32")
        wide = np.kron(scale, np.ones(block))[: values.shape[0], : values.shape[1]]
        arrays[name] = (values.astype("float32") / wide).astype(FP8)
        arrays[name + "_scale_inv"] = scale
        exact[name] = (arrays[name].astype("float32") * wide.astype("float32")).astype(BFLOAT16)
    settings = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    return write(folder, arrays, {**source.config, "quantization_config": settings}), exact


def test_fp8_checkpoint(tiny, tmp_path):
    source = Checkpoint.open(tiny("deepseek_v3", "bfloat16"))
    folder, exact = fp8_checkpoint(source, tmp_path / "fp8")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.quantized
    assert checkpoint.parameters == source.parameters
    assert checkpoint.bytes == sum(entry.bytes for entry in checkpoint.tensors.values()) < source.bytes
    assert any("quantised" in note for note in checkpoint.notes)
    layer = checkpoint.layers[1]
    assert layer.dtype == BFLOAT16
    assert len(layer.names) == 2 * 3 * EXPERTS
    for name in layer.shape.projections:
        found = checkpoint.projection(layer, name)
        expected = np.stack([exact[f"{layer.module}.{e}.{name}_proj.weight"] for e in range(EXPERTS)])
        np.testing.assert_array_equal(bits(found), bits(expected))
        np.testing.assert_array_equal(bits(checkpoint.projection(layer, name, slice(3, 4))), bits(expected[3:4]))
    planned = checkpoint.copied()
    for layer in checkpoint.layers:
        planned += checkpoint.dense_tensors(layer, lambda name, layer=layer: checkpoint.projection(layer, name))
    assert {p.name for p in planned} == set(exact)
    for tensor in planned:
        np.testing.assert_array_equal(tensor.produce().view(np.uint8), exact[tensor.name].view(np.uint8))
    config = checkpoint.dense_config()
    assert "quantization_config" not in config
    assert "quantization_config" in checkpoint.config
    assert {k: v for k, v in checkpoint.config.items() if k != "quantization_config"} == config


def test_mxfp4_checkpoint(tiny, tmp_path):
    source = Checkpoint.open(tiny("gpt_oss", "bfloat16"))
    wide = 32  # MXFP4 has groups of 32 inputs
    arrays = {name: e.read() for name, e in source.tensors.items() if not name.endswith(("up_proj", "down_proj"))}
    exact = {}
    for layer in source.layers:
        for name, out, in_ in (("gate_up_proj", 2 * wide, HIDDEN), ("down_proj", HIDDEN, wide)):
            blocks = RNG.integers(0, 256, (EXPERTS, out, in_ // 32, 16)).astype(np.uint8)
            scales = RNG.integers(110, 130, (EXPERTS, out, in_ // 32)).astype(np.uint8)
            arrays[f"{layer.module}.{name}_blocks"], arrays[f"{layer.module}.{name}_scales"] = blocks, scales
            exact[layer.index, name] = decode_mxfp4(blocks, scales).swapaxes(1, 2)
        arrays[f"{layer.module}.gate_up_proj_bias"] = np.zeros((EXPERTS, 2 * wide), BFLOAT16)
    config = {**source.config, "intermediate_size": wide, "quantization_config": {"quant_method": "mxfp4"}}
    checkpoint = Checkpoint.open(write(tmp_path / "mxfp4", arrays, config))
    for layer in checkpoint.layers:
        assert layer.shape == (EXPERTS, HIDDEN, wide, True)
        assert len(layer.names) == 4
        assert len(layer.biases) == 2
        both, down = exact[layer.index, "gate_up_proj"], exact[layer.index, "down_proj"]
        np.testing.assert_array_equal(bits(checkpoint.projection(layer, "gate")), bits(both[:, 0::2]))
        np.testing.assert_array_equal(bits(checkpoint.projection(layer, "up")), bits(both[:, 1::2]))
        np.testing.assert_array_equal(bits(checkpoint.projection(layer, "down", slice(1, 3))), bits(down[1:3]))
        dense = checkpoint.dense_tensors(layer, lambda name, layer=layer: checkpoint.projection(layer, name))
        assert [(p.name.rpartition(".")[2], p.shape) for p in dense] == [
            ("gate_up_proj", (EXPERTS, HIDDEN, 2 * wide)),
            ("down_proj", (EXPERTS, wide, HIDDEN)),
        ]
        np.testing.assert_array_equal(bits(dense[0].produce()), bits(both.swapaxes(1, 2)))


def int4_checkpoint(source, folder, **settings):
    arrays, exact = {}, {}
    for name, entry in source.tensors.items():
        if ".experts." not in name:
            arrays[name] = entry.read()
            continue
        out, in_ = entry.shape
        values = RNG.integers(-8, 8, (out, in_))
        scale = RNG.lognormal(-4, 1, (out, in_ // 8)).astype(BFLOAT16)
        arrays |= {
            f"{name}_packed": pack_int4(values),
            f"{name}_scale": scale,
            f"{name}_shape": np.array([out, in_]),
        }
        exact[name] = (values * np.repeat(scale.astype("float32"), 8, axis=1)).astype(BFLOAT16)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True, **settings}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }
    return write(folder, arrays, {**source.config, "quantization_config": quantization}), exact


def test_int4_checkpoint(tiny, tmp_path):
    source = Checkpoint.open(tiny("kimi_k2", "bfloat16"))
    folder, exact = int4_checkpoint(source, tmp_path / "int4")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.parameters == source.parameters
    assert [layer.shape for layer in checkpoint.layers] == [(EXPERTS, HIDDEN, INTERMEDIATE, True)] * 2
    for layer in checkpoint.layers:
        for name in layer.shape.projections:
            expected = np.stack([exact[f"{layer.module}.{e}.{name}_proj.weight"] for e in range(EXPERTS)])
            np.testing.assert_array_equal(bits(checkpoint.projection(layer, name)), bits(expected))
        assert len(layer.names) == 3 * 3 * EXPERTS


@pytest.mark.parametrize(("family", "quantise"), [("deepseek_v3", fp8_checkpoint), ("kimi_k2", int4_checkpoint)])
def test_quantised_checkpoints_are_compressed_and_run(family, quantise, tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = quantise(Checkpoint.open(tiny(family, "bfloat16")), tmp_path / "source")
    checkpoint = Checkpoint.open(folder)
    recipe = methods.get("svd")
    plan = make_plan(checkpoint, recipe, recipe.settings(), ratio=0.4)
    logits = {}
    for export in ("factored", "dense"):
        report = compress(checkpoint, tmp_path / export, plan, export=export)
        assert any("quantised" in outcome["detail"] for outcome in report["outcomes"])
        config = json.loads((tmp_path / export / "config.json").read_text())
        assert "quantization_config" not in config
        if config["model_type"] == "kimi_k2":
            (tmp_path / export / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v3"}))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / export, dtype="float32", trust_remote_code=export == "factored"
        )
        with torch.no_grad():
            logits[export] = model.eval()(torch.arange(3, 35)[None]).logits
    assert report["stored"]["parameters"] == checkpoint.parameters
    # The dense export rounds the products of the factors to bfloat16 once more.
    assert (logits["factored"] - logits["dense"]).norm() < 1e-2 * logits["dense"].norm()


def broken(source, folder, change):
    folder, _ = fp8_checkpoint(source, folder)
    opened = {name: entry.read() for name, entry in Checkpoint.open(folder).tensors.items()}
    change(opened)
    return write(folder, opened, json.loads((folder / "config.json").read_text()))


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), "has no FP8 tensor"),
        (lambda t: t.pop(EXPERT + "_scale_inv"), f"{EXPERT} (F8_E4M3) has no scale"),
        (lambda t: t.update({EXPERT + "_scale_inv": np.ones((2, 1), "float32")}), "does not fit blocks of 16x32"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": np.ones(3, "int32")}), "as GPTQ or AWQ in a way"),
    ],
)
def test_incomplete_quantisation_is_refused(change, message, tiny, tmp_path):
    folder = broken(Checkpoint.open(tiny("deepseek_v3", "bfloat16")), tmp_path / "bad", change)
    with pytest.raises(JaxmoeError) as caught:
        Checkpoint.open(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
