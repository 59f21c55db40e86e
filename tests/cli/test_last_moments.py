"""Runs that are killed or stopped at their last moments: the same command ends well, with the bytes of a quiet run.

What a kill leaves is the disk as it was at that moment: copies are taken while a quiet run goes on.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import plain_checkpoint
import pytest
from program import call, checksums

from jaxmoe.checkpoint import atomic, workspace
from jaxmoe.comparison import run as comparison
from jaxmoe.comparison.folder import ComparisonFolder
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.export import orbax

SOME = ("--text", "a.txt", "--length", "32")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a checkpoint of three layers and a text, which is the current one."""
    place = tmp_path / "place"
    source = plain_checkpoint.write(place / "source", num_hidden_layers=3, vocab_size=4096)
    shutil.copyfile(demo_checkpoint() / "tokenizer.json", source / "tokenizer.json")
    (place / "a.txt").write_text(Path(demo_texts()[0]).read_text(encoding="utf-8")[:2_000], encoding="utf-8")
    monkeypatch.chdir(place)
    return place


def well(*words):
    done = call(*words)
    assert done.returncode == 0, done.stderr


class Moments:
    """Copies of a folder, each taken before a call of some function."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.copies: list[Path] = []
        self.patched = pytest.MonkeyPatch()

    def copy(self) -> None:
        copy = self.folder.with_name(f"copy{len(self.copies)}")
        self.copies.append(shutil.copytree(self.folder, copy))

    def before(self, where, name: str, when=lambda *arguments: True) -> None:
        """Take a copy before every call of a module's function whose arguments are those that are looked for."""
        call = getattr(where, name)

        def copied(*arguments, **options):
            if when(*arguments):
                self.copy()
            return call(*arguments, **options)

        self.patched.setattr(where, name, copied)

    def each(self):
        """Bring the folder back to each of the copies."""
        self.patched.undo()
        assert self.copies
        for copy in self.copies:
            shutil.rmtree(self.folder)
            shutil.copytree(copy, self.folder)
            os.chdir(self.folder)
            yield


@pytest.fixture
def moments(place):
    made = Moments(place)
    yield made
    made.patched.undo()


@pytest.mark.parametrize("to", ["dense", "orbax", "safetensors"])
def test_conversion_killed_after_its_output_has_its_name(place, moments, to):
    source = "source"
    if to == "dense":
        well("compress", source, "small", "--method", "svd", "--ratio", "0.4")
        source = "small"
    elif to == "safetensors":
        well("convert", source, "orbax", "--to", "orbax")
        source = "orbax"
    words = ("convert", source, "output", "--to", to)
    for module in (workspace, orbax):
        moments.before(module, "sweep")
    moments.before(os, "rename", lambda old, new: Path(new).name == "output")
    well(*words)
    expected = content(place, to)
    published = 0
    for _ in moments.each():
        published += (place / "output" / ".jaxmoe").exists()
        well(*words)
        assert not (place / "output" / ".jaxmoe").exists()
        assert not (place / "output.partial").exists()
        assert content(place, to) == expected
    assert published == 1


def content(place: Path, to: str) -> dict[str, str]:
    """Return what the output holds; Orbax names its files by chance, so what they are turned back into."""
    if to != "orbax":
        return checksums(place / "output")
    well("convert", "output", "back", "--to", "safetensors")
    found = checksums(place / "back")
    shutil.rmtree(place / "back")
    return found


def test_comparison_killed_while_it_removes_a_checkpoint(place, moments, monkeypatch):
    words = (
        "compare",
        "source",
        "output",
        "--methods",
        "svd",
        "--ratios",
        "0.5",
        *SOME,
        "--windows",
        "2",
        "--baselines",
        "none",
    )
    # Drawing and compiling again take seconds.
    monkeypatch.setattr(comparison, "page", lambda result: "")
    monkeypatch.setattr(comparison.jax, "clear_caches", lambda: None)
    moments.before(ComparisonFolder, "add", lambda *given: hasattr(given[2], "setting"))

    def half(folder, **options):
        """Take a copy in the middle of a removal, too."""
        if weights := sorted(Path(folder).glob("*.safetensors")):
            weights[0].unlink()
            moments.copy()
        rmtree(folder, **options)

    rmtree = shutil.rmtree
    moments.patched.setattr(atomic.shutil, "rmtree", half)
    well(*words)
    expected = measured(place)
    assert expected
    assert "reason" not in str(expected)
    assert len(moments.copies) == 2
    for _ in moments.each():
        well(*words)
        assert measured(place) == expected
        assert not list((place / "output" / "checkpoints").iterdir())


def measured(place: Path) -> dict[str, tuple]:
    """Return what a comparison found, without its times."""
    cells = json.loads((place / "output" / "comparison.json").read_text())["cells"]
    return {
        cell["name"]: (cell.get("reason"), cell.get("bytes"), cell.get("evaluation", {}).get("texts")) for cell in cells
    }


SEQUENTIAL = ("--method", "svd", "--ratio", "0.4", "--sequential", *SOME, "--sequences", "4")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("file", [workspace.layer_file(1), "layer00001.json", workspace.layer_file(2)])
def test_sequential_compression_stopped_in_a_later_layer(place, monkeypatch, file, error):
    well("compress", "source", "quiet", *SEQUENTIAL)
    with monkeypatch.context() as patched:
        replace = os.replace

        def stop(old, new):
            if Path(new).name == file:
                raise error
            replace(old, new)

        patched.setattr(atomic.os, "replace", stop)
        done = call("compress", "source", "output", *SEQUENTIAL)
        assert done.returncode == (130 if isinstance(error, KeyboardInterrupt) else 1)
        assert "same command" in done.stderr
    well("compress", "source", "output", *SEQUENTIAL)
    assert checksums(place / "output") == checksums(place / "quiet")
