"""`jaxmoe evaluate` as a user runs it: what it prints, what bad input gets, and that nothing stays behind."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  numpy learns bfloat16
import numpy as np
import pytest
from program import ENVIRONMENT, call, checksums, command, jaxmoe
from safetensors.numpy import load_file, save_file
from two_layers import short_demo

from jaxmoe.data import demo_texts

TEXT = demo_texts()[0]
SMALL = ("--length", "32", "--sequences", "2", "--generate", "0")
EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"


def test_what_it_prints(tmp_path):
    small = tmp_path / "small"
    assert call("compress", short_demo(), small, "--method", "svd", "--ratio", "0.6").returncode == 0
    arguments = ("evaluate", small, "--text", TEXT, "--text", demo_texts()[1], "--against", short_demo())
    arguments += ("--length", "64", "--sequences", "3", "--generate", "5")
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [text["name"] for text in said["texts"]] == ["code", "literature"]
    for text in said["texts"]:
        assert text["tokens"] == 3 * 63
        assert text["perplexity"] == pytest.approx(np.exp(text["nats_per_token"]))
        assert text["kl"] > 0
        assert 0 < text["top1_agreement"] < 1
        assert text["generation"]["continuation"]
    assert said["length"] == 64
    assert said["kl"] == pytest.approx(np.mean([text["kl"] for text in said["texts"]]))
    assert said["against"]["geometric_mean_perplexity"] < said["geometric_mean_perplexity"]
    assert said["worst"]["perplexity"] == max(text["perplexity"] for text in said["texts"])
    assert said["tokens_per_second"] > 0
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["done"] for event in events if event["model"] == "small"] == [1, 2]

    shown = call(*arguments)
    assert shown.returncode == 0
    assert f"{said['geometric_mean_perplexity']:.3f}" in shown.stdout
    assert f"{said['against']['geometric_mean_perplexity']:.3f}" in shown.stdout
    assert "small: forward through layer 2 of 2" in shown.stderr


def text(content: bytes) -> Callable[[Path], tuple]:
    """Return what gives a file of this content as `--text`."""

    def make(folder: Path) -> tuple:
        (folder / "strange.txt").write_bytes(content)
        return ("--text", folder / "strange.txt")

    return make


def options(*arguments) -> Callable[[Path], tuple]:
    return lambda folder: arguments


def tensors(name: str, value: float) -> Callable[[Path], tuple]:
    """Return what writes a value into a tensor of the checkpoint."""

    def make(folder: Path) -> tuple:
        path = folder / "copy" / "model.safetensors"
        made = load_file(path)
        made[name] = made[name].copy()
        made[name][..., 1] = value
        save_file(made, path, metadata={"format": "pt"})
        return ()

    return make


def tokenizer(change: Callable[[dict], None]) -> Callable[[Path], tuple]:
    """Return what changes the checkpoint's tokenizer; the unchanged checkpoint is what it is compared with."""

    def make(folder: Path) -> tuple:
        path = folder / "copy" / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return ("--against", short_demo())

    return make


def no_tokenizer(folder: Path) -> tuple:
    (folder / "copy" / "tokenizer.json").unlink()
    return ()


def swap(content: dict) -> None:
    """Exchange two tokens: same vocabulary, other meaning."""
    vocabulary = content["model"]["vocab"]
    one, two = [word for word, number in vocabulary.items() if number in (2000, 3000)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def foreign(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary[next(word for word, number in vocabulary.items() if number == 4095)] = 5000


def occupied(folder: Path) -> tuple:
    (folder / "taken").write_text("mine")
    return ("--work", folder / "taken")


class Case(NamedTuple):
    """`make` spoils a copy of the checkpoint or returns more arguments; stderr must hold all `words`."""

    name: str
    words: tuple[str, ...]
    make: Callable[[Path], tuple]
    code: int = 1


CASES = [
    Case("text missing", ("nowhere.txt", "does not exist"), options("--text", "nowhere.txt")),
    Case("text empty", ("strange.txt", "empty"), text(b" \n")),
    Case("text binary", ("strange.txt", "binary"), text(b"abc\0def" * 99)),
    Case("text in Latin-1", ("strange.txt", "UTF-8"), text("äöü".encode("latin-1"))),
    Case("text short", ("strange.txt", "fewer than 32 tokens"), text(b"a few words")),
    Case("two texts of one name", ("code", "rename"), options("--text", TEXT)),
    Case("length beyond the context", ("4096", "2048"), options("--length", "4096")),
    Case("length one", ("at least 2",), options("--length", "1")),
    Case("no sequences", ("at least 1",), options("--sequences", "0")),
    Case("negative generation", ("-3 tokens",), options("--generate", "-3")),
    Case("length a word", ("--length",), options("--length", "long"), code=2),
    Case("original missing", ("nowhere",), options("--against", "./nowhere")),
    Case("no tokenizer", ("tokenizer.json", "copy it"), no_tokenizer),
    Case("tokenizer of another model", ("tokenizer does not match", "5000", "4096"), tokenizer(foreign)),
    Case("tokenizers differ", ("tokenizers", "differ", "original"), tokenizer(swap)),
    Case("NaN in the head", ("logits", "head", "copy"), tensors("lm_head.weight", float("nan"))),
    Case("infinity in the last norm", ("logits", "copy"), tensors("model.norm.weight", float("inf"))),
    Case("NaN in an expert", ("layer 1", "experts among"), tensors(EXPERT, float("nan"))),
    Case("working folder is a file", ("taken", "working folder"), occupied),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(tmp_path, monkeypatch, case):
    shutil.copytree(short_demo(), tmp_path / "copy")
    arguments = case.make(tmp_path)
    before = checksums(tmp_path, ())
    given = () if "strange.txt" in str(arguments) else ("--text", TEXT)
    monkeypatch.chdir(tmp_path)
    done = call("evaluate", tmp_path / "copy", *given, *SMALL, *arguments)
    assert done.returncode == case.code, done.stderr
    assert all(word in done.stderr for word in case.words), done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    if case.code == 1:
        assert done.stderr.splitlines()[-1].startswith("error: ")
    assert checksums(tmp_path, ()) == before


def test_no_text_at_all():
    done = call("evaluate", short_demo())
    assert done.returncode == 2
    assert "--text" in done.stderr


def test_json_errors_are_objects():
    done = call("evaluate", short_demo(), "--text", "nowhere.txt", "--json")
    assert done.returncode == 1
    assert "nowhere.txt" in json.loads(done.stdout)["error"]


def test_a_tokenizer_in_another_layout_is_the_same(tmp_path):
    shutil.copytree(short_demo(), tmp_path / "copy")
    arguments = tokenizer(lambda content: content.update(padding=None, truncation=None))(tmp_path)
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() != (short_demo() / "tokenizer.json").read_bytes()
    done = call("evaluate", tmp_path / "copy", "--text", TEXT, *SMALL, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["top1_agreement"] == 1


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_stopped_at_work_leaves_nothing(tmp_path, sent):
    arguments = ("evaluate", short_demo(), "--text", TEXT.parent, "--work", tmp_path / "work")
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command(*arguments),
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # Programs in the background of a shell ignore it, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert "layer 1 of 2" in process.stderr.readline(), "it is not at work yet"
    time.sleep(0.2)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -sent), said
    assert "Traceback" not in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_disk_too_small(tmp_path):
    import resource

    def limit():
        # No file may grow beyond 64 kB, as on a disk that is full.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = jaxmoe("evaluate", short_demo(), "--text", TEXT, "--work", tmp_path, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert str(tmp_path) in done.stderr
    assert "hidden states" in done.stderr
    assert not any(tmp_path.iterdir())
