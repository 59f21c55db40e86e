"""Run the command line as a user does, in a process of its own, or in this one, which takes seconds less."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from jaxmoe.cli import app

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "jaxmoe", *map(str, arguments)]


def jaxmoe(*arguments, **options) -> subprocess.CompletedProcess:
    """Run the program to its end."""
    return subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300, **options
    )


def call(*arguments) -> subprocess.CompletedProcess:
    """Run the program within this process; what escapes its last resort is raised."""
    words = [str(argument) for argument in arguments]
    done = CliRunner().invoke(app, words, env={"COLUMNS": ENVIRONMENT["COLUMNS"]})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def checksums(folder: Path, leave_out=("report.json", "README.md", "recipe.yaml")) -> dict[str, str]:
    """Return the sha256 of every file of a folder; report, card and recipe hold times and commands."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in leave_out
    }
