"""A hundred and more damaged quantised checkpoints: each is refused, in words that name what is wrong with it."""

import json

import ml_dtypes
import numpy as np
import plain_checkpoint
import pytest
from checkpoint.test_packed_integers import config, group, quantised
from safetensors.numpy import load_file

from jaxmoe.checkpoint import Checkpoint, Planned, write_tensors
from jaxmoe.errors import JaxmoeError

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
MATRICES = ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.self_attn.q_proj.weight")
"""What is damaged: an expert's matrix, and one beside them."""


def fp8(name, shape):
    scale = np.ones((-(-shape[0] // 4), -(-shape[1] // 8)), np.float32)
    return {name: np.ones(shape, ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": scale}


SCHEMES = {
    "fp8": (fp8, FP8),
    "int4": (lambda name, shape: quantised(name, shape, group=4)[0], config(group(4, 4), ignore=["lm_head"])),
    "int3 with zeros": (
        lambda name, shape: quantised(name, shape, bits=3, group=8, zero=True)[0],
        config(group(3, 8, zero=True)),
    ),
    "int8 rows": (lambda name, shape: quantised(name, shape, bits=8, group=0)[0], config(group(8, 0))),
}


def part(end, change):
    """Return a damage of the part of a matrix whose name ends so; the message has to name the matrix."""

    def damage(arrays, settings, name):
        if change is None:
            del arrays[name + end]
        else:
            arrays[name + end] = np.ascontiguousarray(change(arrays[name + end]))

    return damage


def told(**weights):
    """Return a damage of what the config says of all matrices."""

    def damage(arrays, settings, name):
        (only,) = settings["quantization_config"]["config_groups"].values()
        only["weights"] |= weights

    return damage


def narrower(array):
    return array[:, :-1]


def shorter(array):
    return array[:-1]


def flat(array):
    return array.reshape(-1)


def nan(array):
    spoiled = np.array(array)
    spoiled.flat[-1] = np.nan
    return spoiled


def swapped(array):
    return array[::-1]


def floats(array):
    return array.astype(np.float32)


def ints(array):
    return np.ones(array.shape, np.int32)


def as_plain(arrays, settings, name):
    arrays[name] = np.ones((2, 2), ml_dtypes.bfloat16)


def left_out(arrays, settings, name):
    settings["quantization_config"]["ignore"] = [name.removesuffix(".weight")]


def aimed_elsewhere(arrays, settings, name):
    groups = settings["quantization_config"]["config_groups"]
    groups["group_0"]["targets"] = ["re:.*elsewhere$"]
    groups["group_1"] = {"targets": ["re:.*nowhere$"], "weights": groups["group_0"]["weights"]}


OF_INTEGERS = {
    "no codes": part("_packed", None),
    "no scale": part("_scale", None),
    "no shape": part("_shape", None),
    "codes of fewer words": part("_packed", narrower),
    "codes of fewer rows": part("_packed", shorter),
    "flat codes": part("_packed", flat),
    "codes as floats": part("_packed", floats),
    "scales of fewer rows": part("_scale", shorter),
    "flat scales": part("_scale", flat),
    "scales as integers": part("_scale", ints),
    "a scale that is no number": part("_scale", nan),
    "a shape of one number": part("_shape", shorter),
    "a shape of floats": part("_shape", floats),
    "a shape of other numbers": part("_shape", lambda x: x + 32),
    "a plain matrix beside it": as_plain,
    "ignored": left_out,
    "no target": aimed_elsewhere,
    "other bits": told(num_bits=5),
    "other groups": told(strategy="group", group_size=2),
    "wrong kind of bits": told(num_bits="4"),
    "unknown strategy": told(strategy="block"),
    "floats": told(type="float"),
}
OF_ZEROS = {
    "no zeros": part("_zero_point", None),
    "zeros of fewer rows": part("_zero_point", shorter),
    "zeros of fewer groups": part("_zero_point", narrower),
    "flat zeros": part("_zero_point", flat),
    "zeros as floats": part("_zero_point", floats),
    "zeros that the config denies": told(symmetric=True),
}
OF_FP8 = {
    "no matrix": part("", None),
    "no scale": part("_scale_inv", None),
    "scales of fewer rows": part("_scale_inv", lambda x: np.concatenate([x, x[:1]])),
    "scales of other blocks": part("_scale_inv", lambda x: np.ones((3, 5), np.float32)),
    "flat scales": part("_scale_inv", lambda x: np.ones(7, np.float32)),
    "scales as integers": part("_scale_inv", ints),
    "a scale that is no number": part("_scale_inv", nan),
    "a matrix of other rows": part("", lambda x: np.concatenate([x, x[:1], x, x])),
}
OF_ALL = (
    *("no target", "other bits", "other groups", "wrong kind of bits", "unknown strategy", "floats"),
    "zeros that the config denies",
)
"""What is wrong with all matrices at once, of which the first ones are named."""

DAMAGES = {"fp8": OF_FP8, "int4": OF_INTEGERS, "int3 with zeros": OF_INTEGERS | OF_ZEROS, "int8 rows": OF_INTEGERS}
CASES = [(scheme, kind, name) for scheme, kinds in DAMAGES.items() for kind in kinds for name in MATRICES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the config and the tensors of a checkpoint in each scheme."""
    folder = plain_checkpoint.write(tmp_path_factory.mktemp("plain") / "checkpoint")
    arrays, plain = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    found = {}
    for scheme, (parts, settings) in SCHEMES.items():
        own = dict(arrays)
        for name in [name for name in arrays if name.endswith("_proj.weight")]:
            own |= parts(name, own.pop(name).shape)
        found[scheme] = ({**plain, **settings}, own)
    return found


def read(folder):
    """Open a checkpoint and read everything in it."""
    checkpoint = Checkpoint.open(folder)
    for layer in checkpoint.layers:
        for name in layer.shape.projections:
            checkpoint.target(layer, name)
    for matrix in checkpoint.matrices.values():
        if not np.isfinite(matrix.read().astype(np.float32)).all():
            raise JaxmoeError(matrix.name)


def write(folder, settings, arrays):
    folder.mkdir(exist_ok=True)
    planned = [Planned(name, x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()]
    write_tensors(folder / "model.safetensors", planned)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_whole_is_read(scheme, whole, tmp_path):
    read(write(tmp_path / "whole", *whole[scheme]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_is_refused_by_name(scheme, whole, tmp_path):
    assert len(CASES) > 150
    wrong = []
    for own, kind, name in CASES:
        if own != scheme:
            continue
        settings, arrays = json.loads(json.dumps(whole[scheme][0])), dict(whole[scheme][1])
        DAMAGES[scheme][kind](arrays, settings, name)
        try:
            read(write(tmp_path / "damaged", settings, arrays))
            wrong.append(f"{kind}, {name}: read")
        except JaxmoeError as error:
            # Where the config is wrong for all of them, the first ones show it.
            if name not in str(error) and not (kind in OF_ALL and "_proj.weight_packed" in str(error)):
                wrong.append(f"{kind}, {name}: {error}")
    assert not wrong, "\n".join(wrong)
