"""Integers that compressed-tensors packed: their values against a bit by bit reading, and what does not fit."""

import ml_dtypes
import numpy as np
import pytest

from jaxmoe.checkpoint import Planned, write_tensors
from jaxmoe.checkpoint.decoding import decode_integers
from jaxmoe.checkpoint.quantization import assemble
from jaxmoe.checkpoint.tensor_file import read_header
from jaxmoe.errors import JaxmoeError

BFLOAT16 = ml_dtypes.bfloat16
UP, DOWN = (f"model.layers.0.mlp.experts.0.{name}_proj.weight" for name in ("up", "down"))


def pack(codes, bits):
    """Return rows of codes as words, bit by bit: bit i of the stream is bit i % 32 of word i // 32."""
    words = np.zeros((len(codes), -(-codes.shape[1] * bits // 32)), np.uint32)
    for (row, column), code in np.ndenumerate(codes):
        for bit in range(bits):
            place = column * bits + bit
            words[row, place // 32] |= np.uint32((int(code) >> bit & 1) << (place % 32))
    return words.view(np.int32)


def quantised(name, shape=(6, 64), *, bits=4, group=16, zero=False, scale_dtype=BFLOAT16, seed=0):
    """Return the tensors that stand for a random matrix, and its values."""
    random = np.random.default_rng(seed)
    rows, columns = shape
    count = columns // group if group else 1
    codes = random.integers(0, 2**bits, shape)
    zeros = random.integers(0, 2**bits, (rows, count)) if zero else np.full((rows, count), 2 ** (bits - 1))
    scale = random.lognormal(-4, 1, (rows, count)).astype(scale_dtype)
    wide = [x.repeat(columns // count, axis=1) for x in (zeros, scale.astype("float64"))]
    arrays = {f"{name}_packed": pack(codes, bits), f"{name}_scale": scale, f"{name}_shape": np.array(shape)}
    if zero:
        arrays[f"{name}_zero_point"] = pack(zeros.T, bits).T
    return arrays, ((codes - wide[0]) * wide[1]).astype("float32").astype(BFLOAT16)


def group(bits=4, group=16, zero=False, targets=("Linear",), **further):
    weights = {"num_bits": bits, "type": "int", "symmetric": not zero, **further}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"targets": list(targets), "weights": weights}


def config(*groups, ignore=()):
    named = {f"group_{number}": own for number, own in enumerate(groups)}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": named}
    return {"quantization_config": {**settings, "ignore": list(ignore)}}


def write(path, arrays):
    write_tensors(path, [Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()])
    return read_header(path)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("form", [{}, {"zero": True}, {"group": 0}, {"group": 0, "zero": True}])
def test_values(bits, form, tmp_path):
    arrays, exact = quantised(UP, (11, 80), bits=bits, **form)
    (matrix,) = assemble(write(tmp_path / "t", arrays), config(group(bits, **form))).values()
    assert (matrix.name, matrix.shape, matrix.dtype, len(matrix.parts)) == (UP, (11, 80), "BF16", len(arrays))
    np.testing.assert_array_equal(matrix.read().view(np.uint16), exact.view(np.uint16))


@pytest.mark.parametrize("columns", [1, 7, 33, 100])
def test_rows_that_end_within_a_word(columns, tmp_path):
    arrays, exact = quantised(UP, (3, columns), bits=5, group=0, zero=True, scale_dtype="float32")
    (matrix,) = assemble(write(tmp_path / "t", arrays), config(group(5, 0, zero=True))).values()
    np.testing.assert_array_equal(matrix.read(), exact)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero", [False, True])
def test_values_equal_those_of_compressed_tensors(bits, zero):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    torch = pytest.importorskip("torch")
    arrays, _ = quantised("weight", (40, 96), bits=bits, group=32, zero=zero)
    tensors = {
        name: torch.from_numpy(np.asarray(x, np.float32 if x.dtype == BFLOAT16 else x.dtype).copy())
        for name, x in arrays.items()
    }
    tensors["weight_scale"] = tensors["weight_scale"].bfloat16()
    arguments = quantization.QuantizationArgs(num_bits=bits, symmetric=not zero, strategy="group", group_size=32)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    reference = compressors.PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    found = decode_integers(arrays["weight_packed"], arrays["weight_scale"], bits, 96, arrays.get("weight_zero_point"))
    np.testing.assert_array_equal(found.view(np.uint16), reference.view(torch.uint16).numpy())


def test_each_target_has_its_own_group(tmp_path):
    """A name counts before an expression, that before a class; and what is ignored is plain."""
    up, exact_up = quantised(UP, bits=3, group=32)
    down, exact_down = quantised(DOWN, bits=6, group=0, zero=True)
    head = {"lm_head.weight": np.ones((4, 4), BFLOAT16)}
    groups = [group(8), group(3, 32, targets=["re:.*up_proj$"]), group(6, 0, zero=True, targets=[DOWN[:-7]])]
    groups.append(group(2, targets=["re:.*_proj$"]))
    found = assemble(write(tmp_path / "t", up | down | head), config(*groups, ignore=["lm_head", "re:.*gate$"]))
    assert found.keys() == {UP, DOWN, "lm_head.weight"}
    np.testing.assert_array_equal(found[UP].read(), exact_up)
    np.testing.assert_array_equal(found[DOWN].read(), exact_down)


def test_without_settings_the_sizes_tell(tmp_path):
    arrays, exact = quantised(UP, bits=3, group=32, zero=True)
    (matrix,) = assemble(write(tmp_path / "t", arrays), {}).values()
    np.testing.assert_array_equal(matrix.read(), exact)


def changed(part, **how):
    """Return a change of one tensor: another shape, dtype or none at all."""

    def change(arrays):
        if not how:
            del arrays[UP + part]
        else:
            shape = how.get("shape", arrays[UP + part].shape)
            arrays[UP + part] = np.ones(shape, how.get("dtype", arrays[UP + part].dtype))

    return change


def old(bits):
    """Return a change to the packing of compressed-tensors before 0.20."""

    def change(arrays):
        arrays[f"{UP}_packed"] = np.ones((6, -(-64 // (32 // bits))), np.int32)

    return change


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (changed("_scale"), group(), f"{UP}_packed lacks {UP}_scale"),
        (changed("_shape"), group(), f"{UP}_packed lacks"),
        (changed("_scale", shape=(5, 4)), group(), rf"{UP}_packed \[6, 8\] does not fit {UP}_scale \[5, 4\]"),
        (changed("_scale", shape=(6, 3)), group(), rf"{UP}_packed \[6, 8\]: 48 columns of 4 bits"),
        (changed("_scale", shape=(24,)), group(), "does not fit"),
        (changed("_scale", dtype=np.int32), group(), f"{UP}_scale is I32, not F32, BF16, F16"),
        (changed("_packed", shape=(6, 7)), group(), rf"{UP}_packed \[6, 7\]: 64 columns of 4 bits, .* take 8 int32"),
        (changed("_packed", shape=(6, 0)), group(), "does not fit"),
        (changed("_shape", shape=(3,)), group(), f"{UP}_shape is I64"),
        (changed("_shape", dtype=np.float32), group(), f"{UP}_shape is F32"),
        (changed("_shape", dtype=np.int32), group(group=0), f"{UP}_scale .* each row has one scale"),
        (old(3), group(3), r"before 0.20 does it, 10 codes of 3 bits in each int32"),
        (old(7), group(7), r"before 0.20 does it, 4 codes of 7 bits"),
        (None, group(8), rf"{UP}_packed .*8 bits"),
        (None, group(group=32), rf"{UP}_packed \[6, 8\]: 128 columns"),
        (None, group(zero=True), f"{UP}_packed: config.json says not symmetric, and it has no zero points"),
        (None, group(targets=["Linear"], type="float"), "is not of integers"),
        (None, group(bits=9), "is not of integers of 2 to 8 bits"),
        (None, group(bits=True), "is not of integers"),
        (None, {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "block"}}, "strategy 'block'"),
        (None, {"targets": ["Linear"], "weights": {"strategy": "group", "group_size": -3}}, "strategy 'group'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, settings, message, tmp_path):
    arrays, _ = quantised(UP)
    if change is not None:
        change(arrays)
    with pytest.raises(JaxmoeError, match=message):
        assemble(write(tmp_path / "t", arrays), config(settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("_zero_point"), "it has no zero points"),
        (changed("_zero_point", shape=(6, 4)), rf"{UP}_zero_point I32 \[6, 4\] does not fit .* are I32 \[1, 4\]"),
        (changed("_zero_point", dtype=np.int8), f"{UP}_zero_point I8"),
    ],
)
def test_zero_points_that_do_not_fit_are_named(change, message, tmp_path):
    arrays, _ = quantised(UP, zero=True)
    change(arrays)
    with pytest.raises(JaxmoeError, match=message):
        assemble(write(tmp_path / "t", arrays), config(group(zero=True)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (config(group(), ignore=["re:.*up_proj"]), f"{UP}_packed: config.json says under `ignore`"),
        (config(group(), ignore=["re:(["]), "is no expression"),
        (config(group(targets=["re:["])), "is no expression"),
        (config(group(targets=["re:.*down"]), group(targets=["re:.*q_proj"])), "among its targets"),
        (config(group(zero=False)), f"says symmetric, and there is {UP}_zero_point"),
    ],
)
def test_settings_that_contradict_the_tensors(settings, message, tmp_path):
    arrays, _ = quantised(UP, zero="zero_point" in message)
    with pytest.raises(JaxmoeError, match=message):
        assemble(write(tmp_path / "t", arrays), settings)


def test_a_shape_that_is_another_is_found_when_the_matrix_is_read(tmp_path):
    """The headers fit a matrix of half the columns at twice the bits as well; only the shape's numbers tell."""
    arrays, _ = quantised(UP, (6, 64), bits=4, group=16)
    (matrix,) = assemble(write(tmp_path / "t", arrays), config(group(8, 8))).values()
    with pytest.raises(JaxmoeError, match=rf"{UP}_shape says \[6, 64\], .* {UP}_packed holds \[6, 32\]"):
        matrix.read()
