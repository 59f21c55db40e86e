"""Checkpoints of jaxmoe in few bits: what is read when they are opened, and what damaged numbers are told."""

import shutil

import numpy as np
import pytest
from program import call
from safetensors.numpy import load_file, save_file
from two_layers import two_layers

import jaxmoe
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.tensor_file import TensorEntry
from jaxmoe.errors import JaxmoeError

SCALES = "model.layers.1.mlp.experts.down.0.dense_scale"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("bits")
    jaxmoe.compress(two_layers(root / "source"), root / "whole", "rtn4")
    return root / "whole"


def damaged(whole, folder, change):
    shutil.copytree(whole, folder)
    shard = next(path for path in sorted(folder.glob("*.safetensors")) if SCALES in load_file(path))
    tensors = {name: np.array(tensor) for name, tensor in load_file(shard).items()}
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def test_opening_reads_no_codes(whole, monkeypatch):
    read = []
    own = TensorEntry.read
    monkeypatch.setattr(TensorEntry, "read", lambda entry, *rest: read.append(entry.name) or own(entry, *rest))
    opened = CompressedCheckpoint.open(whole)
    assert read == []
    opened.layer(opened.modules[0])
    assert any(name.endswith("_codes") for name in read)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0, -1])
def test_scales_out_of_order_are_named(whole, tmp_path, value):
    def change(tensors):
        tensors[SCALES][5, 0] = value

    folder = damaged(whole, tmp_path / "damaged", change)
    opened = CompressedCheckpoint.open(folder)
    with pytest.raises(JaxmoeError, match=r"layers\.1\.mlp\.experts .*down\.0 .*dense_scale \[5, 0\] is"):
        opened.layer(opened.modules[1])
    done = call("convert", folder, tmp_path / "dense", "--to", "dense")
    assert done.returncode == 1
    assert "dense_scale [5, 0]" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "dense").exists()
