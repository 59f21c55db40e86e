"""Whole runs of every kind of fit end, on one core and on two: nothing waits for a thread that never comes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("whole_runs.py")


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 2])
def test_every_method_ends(tmp_path, cores):
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < cores:
        pytest.skip(f"cannot be pinned to {cores} cores")
    chosen = sorted(os.sched_getaffinity(0))[:cores]
    ran = subprocess.run(
        [sys.executable, PROGRAM, tmp_path, ",".join(map(str, chosen)), "svd", "mobe", "rfid", "d2moe", "nystrom"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 4 * 3 + 2 * 2
