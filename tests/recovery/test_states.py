"""Saved states: read back whole, refused when anything of them changed, with the one before as the way out."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.recovery.run import _metrics
from jaxmoe.recovery.states import States

ARRAYS = {
    "trained.layers.0.router.weight": jnp.arange(600, dtype=jnp.float32).reshape(20, 30),
    "optimizer.0.mu": jnp.ones((2, 3, 4), jnp.float32),
    "step": jnp.asarray(3, jnp.int32),
    "key": jnp.asarray([1, 2], jnp.uint32),
}
ABSTRACT = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in ARRAYS.items()}


def at(step):
    return {**ARRAYS, "step": jnp.asarray(step, jnp.int32)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "states"
    states = States(folder, keep=2)
    for step in (2, 4, 6):
        states.save(step, at(step))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "states")
    return tmp_path / "states"


def newest(folder, logged=6):
    return States(folder, keep=2).newest(ABSTRACT, logged)


def test_the_newest_is_read_and_the_last_ones_remain(folder):
    found = newest(folder)
    assert (found.step, found.damaged) == (6, ())
    for name, expected in at(6).items():
        np.testing.assert_array_equal(found.arrays[name], expected)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "4.json", "6", "6.json"]


def test_nothing_was_saved(tmp_path):
    assert newest(tmp_path / "states") is None


def every_file(folder, step="6"):
    return sorted(path for path in (folder / step).rglob("*") if path.is_file())


def test_every_byte_is_watched(saved, tmp_path):
    """Of each file of a state a byte is flipped, the end cut off, all of it removed or replaced by something else."""

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def truncate(path):
        path.write_bytes(path.read_bytes()[:-1])

    def pipe(path):
        path.unlink()
        os.mkfifo(path)

    def link(path):
        shutil.move(path, tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")

    def nest(path):
        path.unlink()
        path.mkdir()

    for number, original in enumerate(every_file(saved)):
        for change in (flip, truncate, type(original).unlink, pipe, link, nest):
            folder = tmp_path / f"{number}{change.__name__}" / "states"
            shutil.copytree(saved, folder)
            path = folder / original.relative_to(saved)
            if original.stat().st_size:
                change(path)
                found = newest(folder)
                assert found.step == 4
                assert str(path) in found.damaged[0], change
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b"null", b'{"sha256": {}}', b'{"sha256": {"a": 3}}', b"{}"]
)
def test_a_damaged_entry_names_itself(folder, content):
    (folder / "6.json").write_bytes(content)
    found = newest(folder)
    assert found.step == 4
    assert str(folder / "6.json") in found.damaged[0]


def test_a_state_that_was_added_to(folder):
    (folder / "6" / "more").write_text("")
    assert str(folder / "6" / "more") in newest(folder).damaged[0]


def test_a_state_of_another_model_is_not_used(folder):
    """Checksums that fit do not make the arrays fit."""
    for wrong in (
        {"step": jax.ShapeDtypeStruct((2,), jnp.int32, sharding=ABSTRACT["step"].sharding)},
        {"more": ABSTRACT["step"]},
    ):
        with pytest.raises(JaxmoeError, match=r"no saved state .*states/6.*states/4.*--no-resume"):
            States(folder, keep=2).newest({**ABSTRACT, **wrong}, 6)


def test_all_are_damaged(folder):
    for step in ("4", "6"):
        every_file(folder, step)[0].unlink()
    with pytest.raises(JaxmoeError, match=r"no saved state of this run can be used: .*/6/.*; .*/4/.*--no-resume"):
        newest(folder)


def test_a_state_that_was_not_finished_does_not_count(folder):
    (folder / "6.json").unlink()
    (folder / "8.orbax-checkpoint-tmp").mkdir()
    assert newest(folder).step == 4
    States(folder, keep=2).save(6, at(6))
    assert sorted(path.name for path in folder.iterdir()) == ["4", "4.json", "6", "6.json"]
    assert newest(folder).step == 6


def test_a_link_is_never_followed(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("kept")
    (folder / "8").symlink_to(tmp_path / "mine")
    States(folder, keep=1).save(8, at(8))
    assert (tmp_path / "mine" / "precious").read_text() == "kept"
    assert newest(folder, logged=8).step == 8
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    with pytest.raises(JaxmoeError, match="no folder of saved states"):
        States(linked, keep=1)


@pytest.mark.parametrize(
    "spoil",
    [
        b"\xff\xfe\n",
        b'{"step": 5, "lo',
        b"[]\n",
        b'{"step": 7, "loss": 1.0}\n',
        b'{"step": 5}\n',
        b'{"loss": NaN}\n',
        b"\0\n",
    ],
)
def test_metrics_are_read_up_to_what_does_not_read(tmp_path, folder, spoil):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in range(1, 7)]
    path.write_bytes(b"".join([*lines[:4], spoil, *lines[4:]]))
    found = _metrics(path, {"loss"})
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    state = newest(folder, len(found))
    assert state.step == 4
    assert "end at step 4, before state 6" in state.damaged[0]
