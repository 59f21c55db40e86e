"""The array job: tasks over disjoint layers complete one checkpoint, equal to that of a single run."""

import os
import subprocess
import sys
from pathlib import Path

from program import ENVIRONMENT, call, checksums

from jaxmoe.data import demo_checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "array_job.sh"
METHOD = ("--method", "svd", "--ratio", "0.4")


def task(number: int, count: int, output: Path) -> subprocess.CompletedProcess:
    environment = {
        **ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_COUNT": str(count),
    }
    arguments = ["bash", SCRIPT, demo_checkpoint(), output, *METHOD]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_tasks_complete_one_checkpoint(tmp_path):
    """Three tasks over four layers, in any order: nothing under the final name before the last one is done."""
    output = tmp_path / "together"
    for number in (2, 0, 1):
        assert not output.exists()
        done = task(number, 3, output)
        assert done.returncode == 0, done.stderr
    single = call("compress", demo_checkpoint(), tmp_path / "single", *METHOD)
    assert single.returncode == 0, single.stderr
    assert checksums(output) == checksums(tmp_path / "single")


def test_a_task_beyond_the_layers_has_nothing_to_do(tmp_path):
    done = task(0, 9, tmp_path / "out")
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_task_beyond_the_array_is_an_error(tmp_path):
    done = task(2, 2, tmp_path / "out")
    assert done.returncode != 0
    assert "task 2 of 2" in done.stderr
