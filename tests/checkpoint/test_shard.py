"""Files that change, or are none, while they are read: one message that names the file, and never a signal."""

import os

import numpy as np
import plain_checkpoint
import pytest

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def rewrite(path):
    """Write other numbers in the same place, as a download does that goes on in the file itself."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1" * 8)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def replace(path):
    """Put another file in its place."""
    other = path.with_name("new")
    other.write_bytes(path.read_bytes() + b"\0" * 8)
    other.replace(path)


@pytest.mark.parametrize("change", [truncate, empty, rewrite, replace])
def test_a_shard_that_changes_is_named(tmp_path, change):
    folder = plain_checkpoint.write(tmp_path / "checkpoint", shards=2)
    checkpoint, model = Checkpoint.open(folder), StoredModel(folder)
    first = checkpoint.projection(checkpoint.layers[0], "up")
    kept = first.copy()
    for path in folder.glob("*.safetensors"):
        change(path)
    reads = [
        lambda: checkpoint.projection(checkpoint.layers[1], "up"),
        lambda: [planned.produce() for planned in checkpoint.copied()],
        checkpoint.fingerprint,
        lambda: model.layer(1),
        model.ends,
        lambda: model.head()["head.weight"][0:4],
    ]
    for read in reads:
        with pytest.raises(JaxmoeError, match=r"model-0000\d-of-00002\.safetensors was changed while it was in use"):
            read()
    np.testing.assert_array_equal(first, kept)


def test_a_shard_that_vanishes_is_named(tmp_path):
    folder = plain_checkpoint.write(tmp_path / "checkpoint")
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(JaxmoeError, match=r"model\.safetensors does not exist"):
        checkpoint.projection(checkpoint.layers[1], "up")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "part.safetensors"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_waited_for(tmp_path, name, make):
    folder = plain_checkpoint.write(
        tmp_path / "checkpoint", shards=1 if name in ("config.json", "model.safetensors") else 2
    )
    if name == "part.safetensors":
        name = "model-00001-of-00002.safetensors"
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(JaxmoeError, match=f"{name}.*(not a regular file|a link out of)"):
        Checkpoint.open(folder)


def test_a_tensor_is_read_by_rows(tmp_path):
    checkpoint = Checkpoint.open(plain_checkpoint.write(tmp_path / "checkpoint"))
    entry = checkpoint.tensors["lm_head.weight"]
    whole = entry.read()
    assert whole.ctypes.data % 64 == 0
    assert not whole.flags.writeable
    for index in (0, -1, slice(3, 7), slice(30, 99), slice(5, 2), slice(None, None, 3), slice(None)):
        np.testing.assert_array_equal(entry.read(index), whole[index])
    assert entry.abstract().shape == whole.shape
    assert entry.abstract().dtype == whole.dtype
