"""A work folder that was changed by hand is named, and starting over removes nothing but what lies in it."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.checkpoint.workspace import Workspace, finished, layer_file
from jaxmoe.errors import StorageError
from jaxmoe.export.folder import write_report

RUN = {"source": "abc", "seed": 0}
KEY = "key"
RECORD = {"seconds": 1.5, "losses": [1.0, float("nan")], "ranks": {"gate": [3, 4]}}


def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "out", RUN)


def begin(tmp_path) -> Path:
    """Leave the folder of a run that finished its layer 0, and return its journal."""
    work = workspace(tmp_path)
    with work.opened([0]):
        write_bytes(work.folder / layer_file(0), b"content")
        work.finish(0, KEY, sha256(b"content").hexdigest(), RECORD)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "thesis.txt").write_text("mine")
    return work.journal


def reopen(tmp_path, *, resume: bool = True):
    work = workspace(tmp_path)
    with work.opened([0, 1], resume=resume), work.exclusive("publish"):
        return work.entry(0, KEY)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir():
        path.rename(path.with_name("moved"))
    else:
        path.unlink(missing_ok=True)
    make(path)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_text(json.dumps({"seal": "", "record": {"key": KEY, "sha256": "", **RECORD}}))
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    return make


MADE = {
    "null": lambda path: path.write_text("null"),
    "list": lambda path: path.write_text("[1]"),
    "text": lambda path: path.write_text('"x"'),
    "number": lambda path: path.write_text("1e999"),
    "not JSON": lambda path: path.write_text("{"),
    "not UTF-8": lambda path: path.write_bytes(b'{"source": "\xff"}'),
    "deep": lambda path: path.write_text("[" * 100_000),
    "empty": lambda path: path.write_text(""),
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "link": lambda path: path.symlink_to(path.parents[2] / "outside" / "thesis.txt"),
    "link to a folder": lambda path: path.symlink_to(path.parents[2] / "outside"),
    "link to nowhere": lambda path: path.symlink_to("absent"),
    "of an entry: keys missing": edit(lambda entry: entry["record"].pop("sha256")),
    "of an entry: another type": edit(lambda entry: entry.update(record=[1])),
    "of an entry: another value": edit(lambda entry: entry["record"].update(seconds=3)),
    "of an entry: no seal": edit(lambda entry: entry.pop("seal")),
}
NOT_FILES = ("folder", "pipe", "link", "link to a folder", "link to nowhere")


CASES = [
    *(("layer00000.json", made) for made in MADE),
    *(("run.json", made) for made in MADE if "entry" not in made),
    *((name, made) for name in ("layer00000.lock", "publish.lock", "states", "layer") for made in NOT_FILES),
]


@pytest.mark.parametrize(("name", "made"), CASES)
def test_what_no_run_writes_is_named(tmp_path, name, made):
    journal = begin(tmp_path)
    path = journal.parent / layer_file(0) if name == "layer" else journal / name
    replace(path, MADE[made] if name != "layer" else lambda path: at(path, made, tmp_path))
    if (name, made) == ("states", "folder"):
        assert reopen(tmp_path) is not None
        return
    with pytest.raises(StorageError) as caught:
        reopen(tmp_path)
    assert path.name in str(caught.value)
    assert "--no-resume" in str(caught.value)
    assert reopen(tmp_path, resume=False) is None
    assert (tmp_path / "outside" / "thesis.txt").read_text() == "mine"


def at(path: Path, made: str, tmp_path: Path) -> None:
    """Make something one folder higher than the journal."""
    if made.startswith("link"):
        target = {"link": "outside/thesis.txt", "link to a folder": "outside", "link to nowhere": "absent"}[made]
        path.symlink_to(tmp_path / target)
    else:
        MADE[made](path)


def test_whole_entries_are_kept_and_others_done_again(tmp_path):
    journal = begin(tmp_path)
    entry = reopen(tmp_path)
    assert entry is not None
    assert entry["ranks"] == RECORD["ranks"]
    (journal.parent / layer_file(0)).write_bytes(b"other content")
    assert reopen(tmp_path) is None
    (journal / "layer00000.json").unlink()
    assert reopen(tmp_path) is None


@pytest.mark.parametrize("resume", [True, False])
def test_what_is_no_folder_of_a_run_is_never_touched(tmp_path, resume):
    partial, outside = tmp_path / "out.partial", tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("mine")
    for make in (
        lambda: partial.symlink_to(outside),
        lambda: partial.symlink_to("absent"),
        lambda: partial.write_text("mine"),
        lambda: outside.rename(partial),
    ):
        make()
        with pytest.raises(StorageError, match=r"out\.partial"):
            reopen(tmp_path, resume=resume)
        if partial.is_dir() and not partial.is_symlink():
            assert (partial / "thesis.txt").read_text() == "mine"
            break
        partial.unlink()
        assert (outside / "thesis.txt").read_text() == "mine"
    else:
        pytest.fail("the last one is a folder")


def test_journal_that_is_a_link(tmp_path):
    journal = begin(tmp_path)
    moved = journal.rename(tmp_path / "elsewhere")
    journal.symlink_to(moved)
    with pytest.raises(StorageError, match=r"\.jaxmoe is a link"):
        reopen(tmp_path)
    assert reopen(tmp_path, resume=False) is None
    assert (moved / "run.json").is_file()


def test_lost_run_record(tmp_path):
    journal = begin(tmp_path)
    (journal / "run.json").unlink()
    with pytest.raises(StorageError, match=r"lacks run\.json.*--no-resume"):
        reopen(tmp_path)
    assert reopen(tmp_path, resume=False) is None
    # A run that was killed before it had one is nothing to be afraid of.
    other = Workspace(tmp_path / "other", RUN)
    other.journal.mkdir(parents=True)
    (other.journal / ".0123.part").write_bytes(b"{")
    with other.opened([0]):
        assert (other.journal / "run.json").is_file()


@pytest.mark.parametrize("content", [None, "null", "[]", '{"run": 1}', "{", "pipe", "folder"])
def test_outputs_of_others(tmp_path, content):
    output = tmp_path / "out"
    output.mkdir()
    report = output / "report.json"
    if content == "pipe":
        os.mkfifo(report)
    elif content == "folder":
        report.mkdir()
    elif content is not None:
        report.write_text(content)
    with pytest.raises(StorageError, match="exists and holds something else"):
        finished(output, RUN)


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.pop("layers"),
        lambda report: report.update(layers=None),
        lambda report: report["stored"].update(bytes="many"),
        lambda report: report.update(seconds=2.0),
        lambda report: report.update(note="mine"),
        lambda report: report.pop("seal"),
        lambda report: report.update(seal=[1]),
    ],
)
def test_report_that_was_changed(tmp_path, change):
    output = tmp_path / "out"
    output.mkdir()
    record = {"run": RUN, "layers": [{"losses": [float("nan"), 1e-9]}], "stored": {"bytes": 3}, "seconds": 1.5, "ä": {}}
    written = write_report(output, record)
    assert json.dumps(finished(output, RUN)) == json.dumps(written)
    report = json.loads((output / "report.json").read_text())
    change(report)
    (output / "report.json").write_text(json.dumps(report))
    with pytest.raises(StorageError, match=r"out exists, and its report\.json was changed .*: remove it, or choose"):
        finished(output, RUN)
