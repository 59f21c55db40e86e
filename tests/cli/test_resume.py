"""Runs that are killed, shared, repeated or changed: nothing is lost, and the bytes are those of one quiet run."""

import json
import subprocess
import sys
from pathlib import Path

import plain_checkpoint
import pytest
from filelock import FileLock
from program import ENVIRONMENT, call, checksums, command

SVD = ("--method", "svd", "--ratio", "0.4")
MOBE = ("--method", "mobe", "--ratio", "0.4", "--set", "steps=30")


def source_of(tmp_path, layers=6):
    return plain_checkpoint.write(tmp_path / "source", shards=2, num_hidden_layers=layers)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A source and the checksums of an undisturbed run over it."""
    folder = tmp_path_factory.mktemp("quiet")
    source = source_of(folder)
    done = call("compress", source, folder / "quiet", *MOBE)
    assert done.returncode == 0, done.stderr
    return source, checksums(folder / "quiet")


@pytest.mark.slow
def test_killed_at_random_moments():
    """A small number of what `make kills` does."""
    script = Path(__file__).parents[2] / "scripts" / "kills.py"
    some = "mobe,sequential,reap+svd,compare,recover,convert --to dense"
    done = subprocess.run(
        [sys.executable, script, "--kills", "12", "--seed", "1", "--only", some],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1_500,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_finished_layers_are_kept_and_corrupt_ones_are_not(tmp_path, quiet):
    source, expected = quiet
    output = tmp_path / "output"
    done = call("compress", source, output, *MOBE, "--layers", "0:4")
    assert done.returncode == 0, done.stderr
    assert not output.exists()
    assert "still to come" in done.stderr
    spoiled = tmp_path / "output.partial" / "model-layer00002.safetensors"
    content = bytearray(spoiled.read_bytes())
    content[-1] ^= 1
    spoiled.write_bytes(content)
    again = call("compress", source, output, *MOBE)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("kept from an earlier run") == 3
    assert checksums(output) == expected


def test_disjoint_layers_complete_one_checkpoint(tmp_path, quiet):
    source, expected = quiet
    output = tmp_path / "output"
    runs = [
        subprocess.Popen(
            command("compress", source, output, *MOBE, "--layers", span, "--json"),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for span in ("0:3", "3:6")
    ]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert any(json.loads(text)["complete"] for text, _ in outputs)
    assert checksums(output) == expected


def test_second_run_is_kept_out(tmp_path):
    source = source_of(tmp_path, layers=2)
    output = tmp_path / "output"
    assert call("compress", source, output, *SVD, "--layers", "0:1").returncode == 0
    with FileLock(tmp_path / "output.partial" / ".jaxmoe" / "layer00001.lock"):
        for options in ((), ("--no-resume",)):
            done = call("compress", source, output, *SVD, *options)
            assert done.returncode == 1
            assert "another run is working on layer00001" in done.stderr
    assert call("compress", source, output, *SVD).returncode == 0


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (("--ratio", "0.5"), "requested"),
        (("--seed", "7"), "seed"),
        (("--setting", "paper"), "settings"),
        (("--export", "dense"), "export"),
    ],
)
def test_other_settings_are_refused(tmp_path, changed, word):
    source = source_of(tmp_path, layers=2)
    output = tmp_path / "output"
    assert call("compress", source, output, *SVD, "--layers", "0:1").returncode == 0
    done = call("compress", source, output, *SVD, *changed)
    assert done.returncode == 1
    assert "other settings" in done.stderr
    assert word in done.stderr
    assert call("compress", source, output, *SVD, *changed, "--no-resume").returncode == 0
    finished = call("compress", source, output, *SVD)
    assert finished.returncode == 1
    assert "something else" in finished.stderr


def test_changed_source_is_noticed(tmp_path):
    source = source_of(tmp_path, layers=2)
    output = tmp_path / "output"
    assert call("compress", source, output, *SVD, "--layers", "0:1").returncode == 0
    subprocess.run(["rm", "-r", source], check=True)
    plain_checkpoint.write(source, shards=2, seed=1)
    done = call("compress", source, output, *SVD)
    assert done.returncode == 1
    assert "source" in done.stderr


def test_finished_run_is_left_as_it_is(tmp_path):
    source = source_of(tmp_path, layers=2)
    output = tmp_path / "output"
    assert call("compress", source, output, *SVD).returncode == 0
    before = checksums(output, ())
    (output / ".jaxmoe").mkdir()
    again = call("compress", source, output, *SVD, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["complete"]
    assert checksums(output, ()) == before
    assert not (output / ".jaxmoe").exists(), "what a process killed while publishing left is swept"
