"""Quantised formats that are not read, refused under their names; and what is left of formats where nothing is."""

import json

import ml_dtypes
import numpy as np
import plain_checkpoint
import pytest
from planned import compress, make_plan
from safetensors.numpy import load_file

from jaxmoe import methods
from jaxmoe.checkpoint import Checkpoint, Planned, write_tensors
from jaxmoe.checkpoint.inspection import inspect
from jaxmoe.errors import JaxmoeError

ONES = np.ones((8, 2), "float32")
BYTES, WORDS = np.ones((8, 8), "uint8"), np.ones((2, 8), "int32")
E8M0, E4M3 = BYTES.view(ml_dtypes.float8_e8m0fnu), np.ones((8, 1), ml_dtypes.float8_e4m3fn)
GPTQ = {"qweight": WORDS, "qzeros": WORDS, "scales": ONES, "g_idx": WORDS[0]}
NVFP4 = {"weight": BYTES, "weight_scale": E4M3, "weight_scale_2": ONES[0], "input_scale": ONES[0]}
NVFP4_CT = {"weight_packed": BYTES, "weight_scale": E4M3, "weight_global_scale": ONES[0]}
BNB = {"weight": BYTES.reshape(-1, 1), "weight.absmax": ONES[0], "weight.quant_state.bitsandbytes__nf4": BYTES[0]}
INT4 = {"weight_packed": WORDS, "weight_scale": ONES, "weight_shape": np.array([8, 16])}


def method(name, **further):
    return {"quant_method": name, **further}


FORMATS = {
    "gptq": (GPTQ, method("gptq", bits=4), "GPTQ (4 bits)"),
    "auto-round": (GPTQ, method("auto-round", bits=4), "AutoRound (4 bits)"),
    "intel's auto-round": (GPTQ, method("intel/auto-round", bits=2), "AutoRound (2 bits)"),
    "awq": ({"qweight": WORDS, "qzeros": WORDS, "scales": ONES}, method("awq", bits=4), "AWQ (4 bits)"),
    "qweight without settings": (GPTQ, None, "GPTQ or AWQ"),
    "bitsandbytes": (BNB, method("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bitsandbytes (nf4)"),
    "bitsandbytes without settings": (BNB, None, "bitsandbytes"),
    "bitsandbytes 8": ({"weight": BYTES.view("int8"), "SCB": ONES[0]}, method("bitsandbytes"), "bitsandbytes"),
    "eetq": ({"weight": BYTES.view("int8"), "weight_scales": ONES[0]}, method("eetq"), "EETQ"),
    "hqq": ({"W_q": BYTES, "scale": ONES, "zero": ONES}, method("hqq"), "HQQ"),
    "torchao": ({"weight": BYTES.view("int8")}, method("torchao"), "torchao"),
    "quark": ({"weight": BYTES, "weight_scale": BYTES}, method("quark"), "Quark"),
    "nvfp4 of ModelOpt": (NVFP4, method("modelopt", quant_algo="NVFP4"), "ModelOpt (NVFP4)"),
    "nvfp4 of ModelOpt without settings": (NVFP4, None, "NVFP4"),
    "nvfp4 of compressed-tensors": (
        NVFP4_CT,
        method("compressed-tensors", format="nvfp4-pack-quantized"),
        "compressed-tensors (nvfp4-pack-quantized)",
    ),
    "nvfp4 beside FP8": (NVFP4_CT, method("fp8"), "NVFP4"),
    "mxfp4 of compressed-tensors": (
        {"weight_packed": BYTES, "weight_scale": BYTES},
        method("compressed-tensors", format="mxfp4-pack-quantized"),
        "compressed-tensors (mxfp4-pack-quantized)",
    ),
    "int8": (
        {"weight": BYTES.view("int8"), "weight_scale": ONES[:, :1]},
        method("compressed-tensors", format="int-quantized"),
        "compressed-tensors (int-quantized)",
    ),
    "int4 in another order": (
        {**INT4, "weight_g_idx": WORDS[0]},
        method("compressed-tensors", format="pack-quantized"),
        "compressed-tensors (pack-quantized)",
    ),
    "sparse": ({"weight.compressed": ONES[0], "weight.bitmask": BYTES}, None, "compressed-tensors"),
    "DeepSeek-V4": ({"weight": BYTES.view("int8"), "scale": E8M0}, method("fp8"), "FP4 with a power of two"),
    "MLX": (
        {"weight": WORDS.view("uint32"), "scales": ONES, "biases": ONES},
        {"group_size": 32, "bits": 4, "mode": "affine"},
        "MLX (4 bits)",
    ),
    "something new": ({"weight": BYTES.view("int8")}, method("tomorrow"), "tomorrow"),
}


def replace_experts(folder, parts, settings):
    arrays = load_file(folder / "model.safetensors")
    for name in [name for name in arrays if ".experts." in name]:
        del arrays[name]
        arrays |= {name.removesuffix("weight") + part: values for part, values in parts.items()}
    write_tensors(
        folder / "model.safetensors", [Planned(n, x.dtype, x.shape, lambda x=x: x) for n, x in arrays.items()]
    )
    config = json.loads((folder / "config.json").read_text())
    if settings is not None:
        key = "quantization_config" if "quant_method" in settings else "quantization"
        config[key] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_refused_by_name(kind, tmp_path):
    parts, settings, name = FORMATS[kind]
    folder = replace_experts(plain_checkpoint.write(tmp_path / "checkpoint"), parts, settings)
    with pytest.raises(JaxmoeError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert f"quantised as {name}" in message
    assert "in a way that is not read" in message
    assert "take the checkpoint in bfloat16 or float32 that this one was made from" in message
    assert "fetch" not in message
    assert "model.layers.0.mlp.experts.0" in message


LEFT_BEHIND = {
    "fp8": {"quantization_config": method("fp8", weight_block_size=[128, 128])},
    "gptq": {"quantization_config": method("gptq", bits=4)},
    "frozen": {"compression_config": method("compressed-tensors", format="dense")},
    "mlx": {"quantization": {"bits": 4, "group_size": 64}},
    "nothing": {"quantization_config": None},
}


@pytest.mark.parametrize("kind", LEFT_BEHIND)
def test_a_record_without_quantised_weights_is_dropped(kind, tmp_path):
    folder = plain_checkpoint.write(tmp_path / "checkpoint")
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, **LEFT_BEHIND[kind]}))
    (folder / "hf_quant_config.json").write_text("{}")
    said = ["and none is" in note for note in inspect(folder)["notes"]]
    assert said == ([] if kind == "nothing" else [True])
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.dense_config() == plain
    recipe = methods.get("svd")
    plan = make_plan(checkpoint, recipe, recipe.settings(), ratio=0.4)
    for export in ("factored", "dense"):
        output = tmp_path / export
        report = compress(checkpoint, output, plan, export=export)
        assert "quantization" not in (output / "config.json").read_text()
        assert "compression_config" not in (output / "config.json").read_text()
        assert not (output / "hf_quant_config.json").exists()
        assert any("and none is" in outcome["detail"] for outcome in report["outcomes"]) == (kind != "nothing")
