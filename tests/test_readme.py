"""What the README tells people to type exists, and runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from program import checksums
from two_layers import two_layers

from jaxmoe.cli import app
from jaxmoe.data import demo_checkpoint, demo_texts

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = TEXT.split("\n## ")


def blocks(text: str, language: str) -> list[str]:
    """Return the blocks of code of one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str, begin: str = "jaxmoe ") -> list[str]:
    """Return the lines of shell blocks that begin so, without comments."""
    lines = [line.split(" #")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(begin)]


COMMANDS = commands(TEXT)


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
    assert (
        set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(commands(TEXT, "make ")) + TEXT.split("## Development")[1]))
        <= targets
    )
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link


SUBSTITUTES = {
    "DEMO": str(demo_checkpoint()),
    "HELDOUT": str(demo_texts()[0]),
    "CALIBRATION": str(demo_texts()[1]),
}
"""What replaces the placeholders of things that have to be there; CHECKPOINT and outputs keep their names."""

SHORT = {
    "inspect": "",
    "plan": "",
    "compress": "",
    "convert": "",
    "evaluate": "--sequences 2 --generate 4",
    "recover": "--steps 2 --rows 2 --length 64",
    "compare": "--ratios .2 --baselines svd --setting paper --set mobe:steps=2 --set rfid:steps=2 --sequences 2"
    " --windows 1",
}
"""What is appended to a command so that it takes seconds; of an option that was given the last one counts."""


STEPS = {"mobe": "steps=2", "rfid": "steps=2", "compressed_experts": "steps=2", "reap+mobe": "mobe.steps=2"}
"""What makes a method short; of a setting that was given the last value counts."""


def shortened(line: str) -> list[str]:
    """Return the words of a command with few steps and little text."""
    words = [SUBSTITUTES.get(word, word) for word in shlex.split(line)]
    words += shlex.split(SHORT[words[1]])
    if words[1] == "compress":
        words += [word for method in STEPS if method in words for word in ("--set", STEPS[method])]
    if words[1] == "compress" and "--text" in words:
        words += ["--sequences", "2", "--length", "64"]
    return words


EXAMPLES = [
    line
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for line in commands(path.read_text(encoding="utf-8"), "jaxmoe compress ")
    if re.search(r"--method \S+\+", line)
]


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A current folder with a small CHECKPOINT."""
    monkeypatch.chdir(tmp_path)
    two_layers(tmp_path / "CHECKPOINT")


@pytest.mark.slow
@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("line", EXAMPLES)
def test_a_recipe_makes_the_same_as_its_command(line, tmp_path):
    _, *words = shortened(line)
    app(words, standalone_mode=False)
    app(["compress", words[1], "AGAIN", "--recipe", f"{words[2]}/recipe.yaml"], standalone_mode=False)
    assert checksums(tmp_path / words[2]) == checksums(tmp_path / "AGAIN")


@pytest.mark.slow
@pytest.mark.usefixtures("inside")
def test_commands_and_python_run(tmp_path, monkeypatch):
    """Run every block in the order of the README in one folder, so that a command finds what those before it wrote.

    The 60-second start runs as the program that is installed, the other commands in this process: it has imported
    and compiled already what each of theirs would again.
    """
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    dialogue = {"prompt": "Who said that?", "response": "The king said that, and all of the people heard him."}
    (tmp_path / "DIALOGUES.jsonl").write_text(8 * f"{json.dumps(dialogue)}\n")
    ran = []
    for section in SECTIONS:
        for line in commands(section):
            words = shortened(line)
            if words[1] == "compress":
                # The README compresses into OUTPUT again and again, in other ways.
                for left in tmp_path.glob(f"{words[3]}*"):
                    shutil.rmtree(left)
            if section.startswith("60-second start"):
                subprocess.run(words, check=True)
            else:
                app(words[1:], standalone_mode=False)
            ran.append(line)
        # The blocks of a section are one program.
        if python := blocks(section, "python"):
            subprocess.run([sys.executable, "-c", "\n".join(python)], check=True)
    assert ran == COMMANDS
    for folder in ("OUTPUT", "DENSE", "RECOVERED", "TUNED"):
        assert (tmp_path / folder / "config.json").is_file()
    assert (tmp_path / "REPORT" / "index.html").is_file()
