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


@pytest.mark.slow
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
    """Return a program that says at once what `jaxmoe inspect` does of three layers, and otherwise what it is given."""
    source = plain_checkpoint.write(tmp_path / "source", num_hidden_layers=3)
    inspected = call("inspect", source, "--json")
    assert inspected.returncode == 0, inspected.stderr
    (tmp_path / "inspected").write_text(inspected.stdout)
    program = tmp_path / "said"
    program.write_text(
        f"#!/bin/sh\nif [ $1 = inspect ]; then cat '{tmp_path}/inspected'; else printf '%s\\n' \"$@\"; fi\n"
    )
    program.chmod(0o755)
    return str(program)


def test_commands_of_the_tasks_complete_one_checkpoint(tmp_path, said):
    """The commands that the script gives, run in this process, which has imported everything."""
    source, output, spans = tmp_path / "source", tmp_path / "together", []
    for number in (1, 2, 0):
        assert not output.exists()
        done = task(number, 3, source, output, JAXMOE=said)
        assert done.returncode == 0, done.stderr
        words = done.stdout.splitlines()
        assert words[:3] == ["compress", str(source), str(output)]
        spans.append(words[words.index("--layers") + 1])
        finished = call(*words)
        assert finished.returncode == 0, finished.stderr
    assert spans == ["1:2", "2:3", "0:1"]
    spans = [task(number, 2, source, output, JAXMOE=said).stdout.split("--layers\n")[1] for number in (0, 1)]
    assert [span.split()[0] for span in spans] == ["0:1", "1:3"]
    single = call("compress", source, tmp_path / "single", *METHOD)
    assert single.returncode == 0, single.stderr
    assert checksums(output) == checksums(tmp_path / "single")


def test_a_task_beyond_the_layers_has_nothing_to_do(tmp_path, said):
    done = task(0, 9, tmp_path / "source", tmp_path / "out", JAXMOE=said)
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert not list(tmp_path.glob("out*"))


def test_a_task_beyond_the_array_is_an_error(tmp_path, said):
    done = task(2, 2, tmp_path / "source", tmp_path / "out", JAXMOE=said)
    assert done.returncode != 0
    assert "task 2 of 2" in done.stderr
