"""FP8 as different tools write it: the same numbers, with scales of other names and shapes."""

import json

import ml_dtypes
import numpy as np
import plain_checkpoint
import pytest

from jaxmoe.checkpoint import Checkpoint, Planned, write_tensors
from jaxmoe.checkpoint.quantization import assemble
from jaxmoe.checkpoint.tensor_file import read_header
from jaxmoe.errors import JaxmoeError

FP8, BFLOAT16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
RNG = np.random.default_rng(5)
MATRIX = "model.layers.0.mlp.experts.0.up_proj.weight"
BLOCK = {"weight_block_size": [4, 8]}
GROUP = {"quant_method": "compressed-tensors", "format": "float-quantized"}


def of_compressed_tensors(**weights):
    return {**GROUP, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}}


def per_block(scale):
    return scale


def as_modelopt(scale):
    return scale[..., :, None, :, None]


FORMS = {
    "hugging face": ("_scale_inv", (2, 2), per_block, {"quant_method": "fp8", **BLOCK}),
    "compressed-tensors": (
        "_scale",
        (2, 2),
        per_block,
        of_compressed_tensors(type="float", strategy="block", block_structure=[4, 8]),
    ),
    "modelopt": ("_scale", (2, 2), as_modelopt, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}),
    "no settings": ("_scale", (2, 2), per_block, {}),
    "channel": ("_scale", (8, 1), per_block, of_compressed_tensors(type="float", strategy="channel")),
    "channel, flat": ("_scale", (8, 1), lambda s: s[:, 0], {"quant_method": "fbgemm_fp8"}),
    "channel in float32": ("_scale", (8, 1), per_block, {}),
    "tensor": ("_scale", (1, 1), lambda s: s.reshape(()), of_compressed_tensors(type="float", strategy="tensor")),
    "tensor, one number": ("_scale", (1, 1), lambda s: s.reshape(1), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "tensor, inverse": ("_scale_inv", (1, 1), lambda s: s[0, 0], {"quant_method": "fp8", "weight_block_size": None}),
    "group": ("_scale", (8, 4), per_block, of_compressed_tensors(type="float", strategy="group", group_size=4)),
}


def quantised(shape, grid, dtype="float32"):
    """Return FP8 values, scales for a grid of equal blocks, and what they stand for, each rounded once."""
    codes = RNG.integers(0, 256, shape).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    weight, scale = codes.view(FP8), RNG.lognormal(-5, 1, (*shape[:-2], *grid)).astype(dtype)
    wide = scale.astype("float64")
    for axis, (size, count) in zip((-2, -1), zip(shape[-2:], grid, strict=True), strict=True):
        wide = wide.repeat(size // count, axis=axis)
    exact = (weight.astype("float64") * wide).astype("float32").astype(BFLOAT16)
    return weight, scale, exact


def write(path, arrays):
    write_tensors(path, [Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()])
    return read_header(path)


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])
@pytest.mark.parametrize("form", FORMS)
def test_values(form, dtype, tmp_path):
    suffix, grid, shape_of, settings = FORMS[form]
    weight, scale, exact = quantised((8, 16), grid, dtype)
    arrays = {MATRIX: weight, MATRIX + suffix: shape_of(scale), MATRIX[:-6] + "input_scale": np.ones((), "float32")}
    (matrix,) = assemble(write(tmp_path / "t", arrays), {"quantization_config": settings}).values()
    assert (matrix.name, matrix.shape, matrix.dtype) == (MATRIX, (8, 16), "BF16")
    np.testing.assert_array_equal(matrix.read().view(np.uint16), exact.view(np.uint16))


@pytest.mark.parametrize(
    ("grid", "shape_of"),
    [
        ((1, 16), per_block),
        ((8, 1), per_block),
        ((8, 1), lambda s: s[..., 0]),
        (None, lambda s: s[0]),
        ((1, 1), lambda s: s[:, 0, 0]),
        ((2, 2), per_block),
        ((2, 2), as_modelopt),
    ],
)
def test_values_of_all_experts_in_one_tensor(grid, shape_of, tmp_path):
    """As Llama 4's FP8, whose scales belong to the columns, and others; read whole and by the expert."""
    weight, scale, exact = quantised((3, 8, 16), grid or (1, 1))
    if grid is None:  # one scale for all experts
        exact = (weight.astype("float32") * scale[0]).astype(BFLOAT16)
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    (matrix,) = assemble(write(tmp_path / "t", {name: weight, name + "_scale": shape_of(scale)}), {}).values()
    for index in (..., 1, slice(1, 3)):
        np.testing.assert_array_equal(matrix.read(index).view(np.uint16), exact[index].view(np.uint16))


def test_rows_that_no_block_divides(tmp_path):
    """Undeclared blocks are of 128, which is what tools write who do not say."""
    weight = np.ones((160, 130), FP8)
    scale = np.array([[1, 2], [3, 4]], "float32")
    (matrix,) = assemble(write(tmp_path / "t", {MATRIX: weight, MATRIX + "_scale": scale}), {}).values()
    found = matrix.read().astype("float32")
    np.testing.assert_array_equal(found, scale.repeat(128, 0)[:160].repeat(128, 1)[:, :130])


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (2, 2, 2), (5,), (0, 2)])
def test_scales_that_do_not_fit(shape, tmp_path):
    entries = write(tmp_path / "t", {MATRIX: np.ones((8, 16), FP8), MATRIX + "_scale": np.ones(shape, "float32")})
    with pytest.raises(JaxmoeError, match=rf"{MATRIX}_scale F32 \[.*does not fit.*{MATRIX} \[8, 16\]"):
        assemble(entries, {"quantization_config": {"quant_method": "fp8", **BLOCK}})


def test_only_some_modules_may_be_quantised(tmp_path):
    """What the settings ignore is plain, and what belongs to activations is no matrix of the model."""
    source = Checkpoint.open(plain_checkpoint.write(tmp_path / "source"))
    folder = plain_checkpoint.write(tmp_path / "quantised")
    arrays = {name: entry.read() for name, entry in source.tensors.items()}
    exact = {}
    for name in [name for name in arrays if "layers.0" in name and ".experts." in name]:
        arrays[name], arrays[name + "_scale"], exact[name] = quantised(arrays[name].shape, (arrays[name].shape[0], 1))
        arrays[name[:-6] + "input_scale"] = np.ones((), "float32")
    arrays["model.layers.0.self_attn.k_scale"] = np.ones((), "float32")
    write(folder / "model.safetensors", arrays)
    settings = of_compressed_tensors(type="float", strategy="channel")
    (folder / "config.json").write_text(json.dumps({**source.config, "quantization_config": settings}))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.matrices.keys() == source.tensors.keys()
    for name, matrix in checkpoint.matrices.items():
        np.testing.assert_array_equal(matrix.read(), exact.get(name, source.matrices[name].read()))
    assert checkpoint.dense_config() == source.config
