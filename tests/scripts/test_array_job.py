"""The array job: tasks over disjoint layers complete one checkpoint, equal to that of a single run."""

import os
import subprocess
import sys
from pathlib import Path

import plain_checkpoint
import pytest
from program import ENVIRONMENT, call, checksums

SCRIPT = Path(__file__).parents[2] / "scripts" / "array_job.sh"
METHOD = ("--method", "svd", "--ratio", "0.4")


def task(number: int, count: int, source: Path, output: Path, **more: str) -> subprocess.CompletedProcess:
    environment = {
        **ENVIRONMENT,
        **more,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_COUNT": str(count),
    }
    arguments = ["bash", SCRIPT, source, output, *METHOD]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_tasks_complete_one_checkpoint(tmp_path):
    """Two tasks over three layers, in any order: nothing under the final name before the last one is done."""
    source, output = plain_checkpoint.write(tmp_path / "source", num_hidden_layers=3), tmp_path / "together"
    for number in (1, 0):
        assert not output.exists()
        done = task(number, 2, source, output)
        assert done.returncode == 0, done.stderr
    single = call("compress", source, tmp_path / "single", *METHOD)
    assert single.returncode == 0, single.stderr
    assert checksums(output) == checksums(tmp_path / "single")


@pytest.fixture
def said(tmp_path):
    """Return a program that says what `jaxmoe inspect` does of two layers, at once."""
    program = tmp_path / "said"
    program.write_text("#!/bin/sh\necho '{\"moe_layers\": [0, 1]}'\n")
    program.chmod(0o755)
    return str(program)


def test_a_task_beyond_the_layers_has_nothing_to_do(tmp_path, said):
    done = task(0, 9, tmp_path / "source", tmp_path / "out", JAXMOE=said)
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


def test_a_task_beyond_the_array_is_an_error(tmp_path, said):
    done = task(2, 2, tmp_path / "source", tmp_path / "out", JAXMOE=said)
    assert done.returncode != 0
    assert "task 2 of 2" in done.stderr
