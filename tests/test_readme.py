"""What the README tells people to type exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from jaxmoe.cli import app
from jaxmoe.data import demo_checkpoint

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [match.group(1) for match in re.finditer(r"```sh\n(.*?)```", TEXT, re.DOTALL)]
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if line.startswith("jaxmoe ")]


def parse(line: str):
    """Return what the command line understands, or fail as it would, without running anything."""
    group = typer.main.get_command(app)
    _, *arguments = shlex.split(line)
    with group.make_context("jaxmoe", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, arguments)
        return command.make_context(name, rest, parent=context).params


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_understood(line):
    assert parse(line)


def test_a_wrong_command_would_be_noticed():
    with pytest.raises(Exception, match="--no-such-option"):
        parse("jaxmoe inspect CHECKPOINT --no-such-option")


def test_all_commands_are_in_the_table():
    listed = set(re.findall(r"^\| `jaxmoe (\w+)", TEXT, re.MULTILINE))
    assert listed == {command.callback.__name__ for command in app.registered_commands}


def test_targets_and_files_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(LINES) + TEXT.split("## Development")[1])) <= targets
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_sixty_second_start_runs(tmp_path):
    """Run the block as it stands, on the bundled checkpoint, then load the result as the README says."""
    start = TEXT.split("## 60-second start")[1].split("\n## ")[0]
    shell = re.findall(r"```sh\n(.*?)```", start, re.DOTALL)
    python = re.findall(r"```python\n(.*?)```", start, re.DOTALL)
    assert len(shell) == len(python) == 1
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = shell[0].replace("CHECKPOINT", shlex.quote(str(demo_checkpoint())))
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, check=True)
    subprocess.run([sys.executable, "-c", python[0]], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "OUTPUT" / "report.json").is_file()
