"""Where a run may write is checked once, before anything is written."""

import os
import sys
from pathlib import Path

import plain_checkpoint
import pytest
from program import call

from jaxmoe.checkpoint.output import output_folder
from jaxmoe.errors import StorageError


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with a file, links and a source, as the current one."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("absent/folder")
    (tmp_path / "to_file").symlink_to("file")
    (tmp_path / "source" / "inner").mkdir(parents=True)
    (tmp_path / "to_source").symlink_to("source")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


UNFIT = {
    "": "names no folder of its own",
    ".": "names no folder of its own",
    "..": "names no folder of its own",
    "source/..": "names no folder of its own",
    "/": "names no folder of its own",
    "file": "file is a file",
    "file/out": "file is a file",
    "file/deep/out": "file is a file",
    "to_file/out": "to_file is a file",
    "pipe": "pipe is a pipe",
    "loop": "loop is a link that leads nowhere",
    "loop/out": "loop is a link that leads nowhere",
    "nowhere": "nowhere is a link that leads nowhere",
    "nowhere/out": "nowhere is a link that leads nowhere",
    "absent/../out": "absent does not exist",
    "/dev/null": "/dev/null is a device",
    "/dev/null/out": "/dev/null is a device",
    "a\0b": "null character",
    "na\udce9ve": "not valid Unicode",
    "~no_such_user_at_all/out": "home",
    "o" * 255: "letters too many",
    "o" * 248: "letters too many",
    "ä" * 124: "letters too many",
    f"{'o' * 256}/out": "letters too many",
    "o/" * 2_000 + "out": "too long",
    "source": "is what this run reads",
    "to_source": "is what this run reads",
    "source/inner/out": "lies in source",
    "to_source/out": "lies in source",
    "absent": None,
    "absent/deep/out": None,
    "source2": None,
    "o" * 247: None,
}


@pytest.mark.parametrize("path", UNFIT, ids=lambda path: ascii(path[:20]))
def test_paths(places, path):
    before = sorted(places.rglob("*"))
    said = UNFIT[path]
    if said is None:
        assert output_folder(path, ["source", None, "Qwen/not-a-folder"]) == places / path
    else:
        with pytest.raises(StorageError, match=said):
            output_folder(path, ["source"])
    assert sorted(places.rglob("*")) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_where_nothing_can_be_made():
    with pytest.raises(StorageError, match="/proc cannot be written to"):
        output_folder("/proc/out")
    with pytest.raises(StorageError, match="cannot be written to"):
        output_folder("/proc/self/task/out", into=True)


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="becomes another user for a moment")
def test_folder_of_somebody_else(tmp_path):
    os.chmod(tmp_path, 0o755)
    (tmp_path / "theirs").mkdir(mode=0o700)
    child = os.fork()
    if not child:
        for parent in tmp_path.parents[:2]:
            os.chmod(parent, 0o755)
        os.setuid(65534)
        said = []
        for path in (tmp_path / "out", tmp_path / "theirs" / "out"):
            try:
                output_folder(path)
            except StorageError as error:
                said.append("cannot be" in str(error))
        os._exit(0 if said == [True, True] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_folders_beside_are_kept_apart_too(places):
    (places / "out.partial" / "source").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"is to be read, and lies in .*out.partial"):
        output_folder("out", ["out.partial/source"])
    (places / "out.steps").mkdir()
    with pytest.raises(StorageError, match=r"out.steps is what this run reads"):
        output_folder("out", ["out.steps"], beside=(".partial", ".steps"))
    (places / "linked.partial").symlink_to("source")
    with pytest.raises(StorageError, match="is what this run reads"):
        output_folder("linked", ["source"])
    # Statistics lie beside the output by their own name, and are only read.
    (places / "out.statistics").mkdir()
    assert output_folder("out", ["out.statistics"]) == places / "out"


def test_existing_folders(places):
    assert output_folder("to_source", into=True) == places / "to_source"
    with pytest.raises(StorageError, match=r"source/inner is to be read, and lies in "):
        output_folder("to_source", ["source/inner"], into=True)


TEXT = ("--text", "texts/a.txt")
WRITING = {
    "svd": ("compress", "source", ..., "--method", "svd", "--ratio", "0.4"),
    "calibrated": ("compress", "source", ..., "--method", "svd", "--ratio", "0.4", *TEXT),
    "sequential": ("compress", "source", ..., "--method", "svd", "--ratio", "0.4", "--sequential", *TEXT),
    "slim": ("compress", "source", ..., "--method", "reap", "--ratio", "0.25", *TEXT),
    "chain": ("compress", "source", ..., "--method", "reap+svd", "--ratio", "0.4", *TEXT),
    "compressed_experts": ("compress", "source", ..., "--method", "compressed_experts", "--main-experts", "1"),
    "calibrate": ("calibrate", "source", ..., *TEXT),
    "recover": ("recover", "source", ..., *TEXT),
    "compare": ("compare", "source", ..., "--methods", "svd", "--ratios", "0.4", *TEXT),
    "orbax": ("convert", "source", ..., "--to", "orbax"),
    "dense": ("convert", "small", ..., "--to", "dense"),
    "safetensors": ("convert", "orbax", ..., "--to", "safetensors"),
    "demo": ("demo", ...),
    "evaluate": ("evaluate", "source", *TEXT, "--work", ...),
}
"""Every command that writes, with its output left open."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a checkpoint in every form, and a text."""
    from jaxmoe.data import demo_checkpoint

    folder = tmp_path_factory.mktemp("workplace")
    plain_checkpoint.write(folder / "source", vocab_size=4096)
    (folder / "source" / "tokenizer.json").write_bytes((demo_checkpoint() / "tokenizer.json").read_bytes())
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("Once upon a time. " * 50)
    (folder / "file").write_text("mine")
    (folder / "to_source").symlink_to("source")
    for arguments in (
        ("compress", folder / "source", folder / "small", "--method", "svd", "--ratio", "0.4"),
        ("convert", folder / "source", folder / "orbax", "--to", "orbax"),
    ):
        done = call(*arguments)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "output", ["", "file/out", "/dev/null/out", "o" * 256, "na\udce9ve", "<source>/new", "<link>/new"]
)
@pytest.mark.parametrize("command", WRITING)
def test_every_command_asks(workplace, monkeypatch, command, output):
    monkeypatch.chdir(workplace)
    if command == "evaluate" and output == "":
        pytest.skip("the current folder does for temporary files")
    read = WRITING[command][1]
    if "<" in output:
        if command == "demo":
            pytest.skip("reads the bundled checkpoint, where nothing is to be tried out")
        if output.startswith("<link>") and read != "source":
            pytest.skip("no link leads there")
        output = output.replace("<source>", str(read)).replace("<link>", "to_source")
    before = sorted(workplace.rglob("*"))
    done = call(*(output if word is ... else word for word in WRITING[command]))
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert any(mend in done.stderr for mend in ("choose another folder", "give a shorter name", "to create"))
    assert sorted(workplace.rglob("*")) == before


@pytest.mark.parametrize("command", ["calibrated", "calibrate", "recover", "compare"])
def test_nothing_is_written_among_the_texts(workplace, monkeypatch, command):
    monkeypatch.chdir(workplace)
    words = ["texts/new" if word is ... else str(word) for word in WRITING[command]]
    done = call(*(word.replace("texts/a.txt", "texts") for word in words))
    assert done.returncode == 1
    assert "lies in texts" in done.stderr
    assert [path.name for path in Path("texts").iterdir()] == ["a.txt"]
