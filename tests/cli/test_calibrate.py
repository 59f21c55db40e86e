"""Calibration, and compression with it, as a user runs them: results, stops, and what bad input gets."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from program import ENVIRONMENT, call, checksums, command
from two_layers import short_demo

from jaxmoe.data import demo_checkpoint, demo_texts

TEXT = demo_texts()[0].parent
QUICK = ("--sequences", "4", "--length", "64")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory) -> Path:
    """Return a small statistics folder."""
    folder = tmp_path_factory.mktemp("calibrated") / "statistics"
    done = call("calibrate", short_demo(), folder, "--text", TEXT, *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["tokens"] == 5 * 4 * 63
    assert [layer["layer"] for layer in record["layers"]] == [0, 1]
    assert all(0 < layer["busiest"] <= 1 for layer in record["layers"])
    return folder


def compress(output: Path, *options):
    return call("compress", short_demo(), output, "--method", "svd", "--ratio", "0.4", *options, "--json")


def report(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> tuple[Path, dict]:
    """Return a checkpoint that was calibrated and compressed by one command, and the report."""
    output = tmp_path_factory.mktemp("compressed") / "out"
    return output, report(compress(output, "--text", TEXT, *QUICK))


def test_weighing_lowers_the_weighted_error(calibrated, tmp_path):
    output, weighted = calibrated
    plain = report(compress(tmp_path / "plain"))
    assert plain["calibration"] is None
    assert weighted["calibration"]["tokens"] == 5 * 4 * 63
    assert weighted["achieved"] == plain["achieved"]
    for before, after in zip(plain["layers"], weighted["layers"], strict=True):
        for name, record in after["projections"].items():
            assert before["projections"][name]["weighted_error"] is None
            assert record["weighted_error"] < record["error"]
            assert before["projections"][name]["error"] < record["error"]
    assert "1,260 tokens" in (output / "README.md").read_text()


def test_texts_are_calibrated_on_first(statistics, calibrated, tmp_path):
    output, _ = calibrated
    assert checksums(output.with_name("out.statistics")) == checksums(statistics)
    report(compress(tmp_path / "again", "--statistics", statistics))
    assert checksums(tmp_path / "again") == checksums(output)


SEQUENTIAL = ("--text", TEXT, *QUICK, "--sequential")


@pytest.fixture(scope="module")
def sequential(tmp_path_factory) -> tuple[Path, dict]:
    """Return what is compressed layer by layer, each behind those before it, and the report."""
    output = tmp_path_factory.mktemp("sequential") / "out"
    return output, report(compress(output, *SEQUENTIAL))


def test_behind_the_compressed_layers(calibrated, sequential):
    (_, plain), (output, first) = calibrated, sequential
    assert first["calibration"]["sequential"]
    assert not list(output.parent.rglob("*.f32"))
    same, different = ([layer["projections"]["gate"]["error"] for layer in each["layers"]] for each in (first, plain))
    assert same[0] == pytest.approx(different[0], rel=1e-6), "nothing stands before the first layer"
    assert all(abs(a - b) > 1e-5 for a, b in zip(same[1:], different[1:], strict=True))


@pytest.mark.slow
def test_a_killed_sequential_compression_goes_on(sequential, tmp_path):
    running = subprocess.Popen(
        [
            *command("compress", short_demo(), tmp_path / "cut", "--method", "svd", "--ratio", "0.4"),
            *map(str, SEQUENTIAL),
        ],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = tmp_path / "cut.partial" / ".jaxmoe"
    while not (journal / "layer00000.json").exists() and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    report(compress(tmp_path / "cut", *SEQUENTIAL))
    assert checksums(tmp_path / "cut") == checksums(sequential[0])


def test_a_finished_calibration_is_only_shown(statistics):
    before = checksums(statistics, ())
    again = call("calibrate", short_demo(), statistics, "--text", TEXT, *QUICK, "--json")
    assert again.returncode == 0
    assert again.stderr == ""
    assert checksums(statistics, ()) == before


def kill_when(pattern: str, arguments, output: Path) -> bool:
    """Start a run and kill it when a file appears in the journal of its unfinished output; return whether that hit."""
    journal = output.with_name(f"{output.name}.partial") / ".jaxmoe"
    running = subprocess.Popen(
        command(*arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while running.poll() is None and not any(journal.glob(pattern)):
        time.sleep(0.002)
    running.kill()
    return running.wait() == -signal.SIGKILL


FORWARD = ("*-layer00000.json", "*-layer00002.json")
BACKWARD = ("states/hidden00002.f32", "*-layer00003.json", "*-layer00001.json")


@pytest.mark.slow
@pytest.mark.parametrize(("gradients", "stops"), [((), FORWARD), (("--gradients", "token"), BACKWARD)])
def test_a_killed_calibration_goes_on(gradients, stops, tmp_path):
    options = ("--text", TEXT, *QUICK, *gradients)
    whole = call("calibrate", demo_checkpoint(), tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr
    expected = checksums(tmp_path / "whole")
    output = tmp_path / "s"
    arguments = ("calibrate", demo_checkpoint(), output, *options)
    hits = []
    for pattern in stops:
        hits.append(kill_when(pattern, arguments, output))
        # A run that was faster than the killer has published everything, and may have left its journal.
        found = {name: checksum for name, checksum in checksums(output).items() if not name.startswith(".jaxmoe")}
        assert found == (expected if output.exists() else {})
        assert hits[-1] or found, "a run that was not killed publishes"
    assert any(hits)
    assert call(*arguments).returncode == 0
    assert checksums(output) == expected
    again = call(*arguments, "--json")
    assert again.returncode == 0
    assert again.stderr == "", "a finished calibration is only shown"


BAD = {
    "no such text": (("--text", "nowhere.txt"), "nowhere.txt does not exist"),
    "empty text": (("--text", "empty.txt"), "empty.txt is empty"),
    "binary text": (("--text", "binary.txt"), "binary.txt is binary"),
    "short text": (("--text", "short.txt"), "fewer than 256 tokens in short.txt"),
    "too long windows": (("--text", TEXT, "--length", "99999"), "windows of 99999 tokens: the model takes 2048"),
    "windows of one token": (("--text", TEXT, "--length", "1"), "give a length of at least 2"),
    "no windows": (("--text", TEXT, "--sequences", "0"), "give at least 1"),
    "layers out of order": (("--text", TEXT, "--layers", "3:1"), "give FIRST:END with FIRST < END"),
    "layers without experts": (("--text", TEXT, "--layers", "7:9"), "layers 7:9 hold no routed experts"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calibration(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"ab\0cd")
    (tmp_path / "short.txt").write_text("a few words")
    arguments, message = BAD[name]
    done = call("calibrate", short_demo(), "s", *arguments, "--json")
    assert done.returncode == 1, done.stderr
    assert message in json.loads(done.stdout)["error"]
    assert not (tmp_path / "s").exists()


def edited(tmp_path: Path, change) -> Path:
    """Return a copy of the bundled checkpoint with its config changed."""
    folder = shutil.copytree(short_demo(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    return folder


def test_a_tokenizer_that_does_not_match(tmp_path):
    folder = shutil.copytree(short_demo(), tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 5000, "content": "<odd>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = tmp_path / "odd.txt"
    text.write_text(demo_texts()[0].read_text(encoding="utf-8").replace(" the ", " <odd> "), encoding="utf-8")
    done = call("calibrate", folder, tmp_path / "s", "--text", text, *QUICK)
    assert done.returncode == 1
    assert all(word in done.stderr for word in ("odd.txt", "'<odd>'", "embeddings of 4096 only")), done.stderr
    assert not (tmp_path / "s").exists()


def test_an_attribute_that_nobody_knows(tmp_path):
    folder = edited(tmp_path, lambda config: {**config, "shiny_new_trick": 2, "another_one": "x"})
    done = call("calibrate", folder, tmp_path / "s", "--text", TEXT, *QUICK)
    assert done.returncode == 1
    assert "another_one ('x'), shiny_new_trick (2)" in done.stderr


def test_statistics_that_do_not_serve(statistics, tmp_path):
    other = edited(tmp_path, lambda config: {**config, "rms_norm_eps": 1e-5})
    done = call("compress", other, tmp_path / "o", "--method", "svd", "--ratio", "0.4", "--statistics", statistics)
    assert done.returncode == 1
    assert "is of another model than" in done.stderr
    both = compress(tmp_path / "o", "--statistics", statistics, "--text", TEXT)
    assert "both --statistics and --text" in json.loads(both.stdout)["error"]
    none = compress(tmp_path / "o", "--statistics", tmp_path / "none")
    assert "has no statistics.json" in json.loads(none.stdout)["error"]
    part = tmp_path / "part"
    assert call("calibrate", short_demo(), part, "--text", TEXT, *QUICK, "--layers", "0:1").returncode == 0
    missing = compress(tmp_path / "o", "--statistics", part)
    assert "has no layer 1" in json.loads(missing.stdout)["error"]
    alone = compress(tmp_path / "o", "--sequential")
    assert "--sequential goes from the first layer to the last with --text" in json.loads(alone.stdout)["error"]
    assert not (tmp_path / "o").exists()
