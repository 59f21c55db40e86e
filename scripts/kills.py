"""Kill every command at random moments, resume it until it is done, and compare its bytes with those of a quiet run.

    python scripts/kills.py [--kills 200] [--seed 0] [--points] [--only NAME,...]

By default so many runs, shared among the commands, get SIGKILL at a moment drawn evenly from the time that a quiet run
takes. With --points every run is killed once at each of its operations on files instead (opened for writing, renamed,
removed, made, locked): where the order of two of them matters, this finds it. The runs are forks of this process, which
has imported everything and started nothing: a run then takes a second or two. A table says how many of the kills hit,
and the exit code is 1 if a result differed, a run failed or one hung. Needs a system that can fork; writes to a
temporary folder alone.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxmoe-kills-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import plain_checkpoint  # pyright: ignore[reportMissingImports]
from orbax.checkpoint import v1 as _orbax  # noqa: F401  imported for the forks
from rich.console import Console
from rich.table import Table

import jaxmoe
import jaxmoe.cli
from jaxmoe.data import demo_checkpoint, demo_texts

for _name in jaxmoe.__all__:
    getattr(jaxmoe, _name)

LIMIT = 300
"""Seconds after which a run counts as hung."""

TIMES = {
    "seconds",
    "layer_seconds",
    "peak_bytes",
    "tokens_per_second",
    "output",
    "command",
    "commands",
    "statistics",
    "folder",
    "seal",
}
"""Keys of reports that differ from run to run: times, what names the folder of the output, and the seal over them."""

KILLED = -signal.SIGKILL


class Command(NamedTuple):
    """What is run: its name, its words, with `...` for the output, and what tells whether the results are the same."""

    name: str
    words: tuple[Any, ...]
    identity: Callable[[Path], Mapping[str, str]]


def checksums(folder: Path) -> dict[str, str]:
    """Return a checksum of every file; of reports, of what does not depend on the time and the place."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name in ("report.json", "comparison.json"):
            content = json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
        if path.name != "README.md":
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def tables(folder: Path) -> dict[str, str]:
    """Return the checksum of what a comparison measured; its tables and its page hold times."""
    return {"comparison.json": checksums(folder)["comparison.json"]}


def arrays(folder: Path) -> dict[str, str]:
    """Return the checksums of the safetensors files that an Orbax checkpoint is turned back into."""
    back = folder.with_name(f"{folder.name}-back")
    if Run(["convert", folder, back, "--to", "safetensors"]).end() != 0:
        return {"back": "could not be read"}
    found = checksums(back)
    shutil.rmtree(back)
    return found


def _timeless(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: _timeless(value) for key, value in record.items() if key not in TIMES}
    return [_timeless(value) for value in record] if isinstance(record, list) else record


def prepare(folder: Path) -> list[Command]:
    """Write a checkpoint and texts, and return the commands over them."""
    source = plain_checkpoint.write(folder / "source", shards=2, num_hidden_layers=3, vocab_size=4096)
    shutil.copyfile(demo_checkpoint() / "tokenizer.json", source / "tokenizer.json")
    (folder / "texts").mkdir()
    for name, text in zip(("a.txt", "b.txt"), demo_texts()):
        (folder / "texts" / name).write_text(Path(text).read_text(encoding="utf-8")[:4_000], encoding="utf-8")
    small, orbax = folder / "small", folder / "orbax"
    texts = ("--text", folder / "texts" / "a.txt", "--length", "32")
    some = (*texts, "--sequences", "4")
    for words in (
        ("compress", source, small, "--method", "svd", "--ratio", "0.4"),
        ("convert", source, orbax, "--to", "orbax"),
    ):
        if Run(words).end() != 0:
            raise SystemExit(f"{words} failed")
    compress = ("compress", source, ..., "--method")

    def steps(number: int) -> tuple[str, str]:
        return ("--set", f"steps={number}")

    return [
        Command("svd", (*compress, "svd", "--ratio", "0.4"), checksums),
        Command("svd dense", (*compress, "svd", "--ratio", "0.4", "--export", "dense"), checksums),
        Command("mobe", (*compress, "mobe", "--ratio", "0.4", *steps(20)), checksums),
        Command("rfid", (*compress, "rfid", "--ratio", "0.4", *steps(20)), checksums),
        Command("d2moe", (*compress, "d2moe", "--ratio", "0.4", *some), checksums),
        Command("sequential", (*compress, "svd", "--ratio", "0.4", "--sequential", *some), checksums),
        Command("reap", (*compress, "reap", "--ratio", "0.25", *some), checksums),
        Command("reap+svd", (*compress, "reap+svd", "--ratio", "0.5", *some), checksums),
        Command(
            "compressed_experts",
            (*compress, "compressed_experts", "--main-experts", "1", *some, *steps(20)),
            checksums,
        ),
        Command("rtn", (*compress, "rtn", "--ratio", "0.6", "--unit", "bytes"), checksums),
        *(
            Command(name, (*compress, name, *some), checksums)
            for name in ("hqq3", "gptq3", "squeezellm3", "milo3", "slim_llm3")
        ),
        Command("quantmoe", (*compress, "quantmoe", "--ratio", "0.65", "--unit", "bytes", *some), checksums),
        Command("svd+gptq4", (*compress, "svd+gptq4", "--ratio", "0.8", "--unit", "bytes", *some), checksums),
        Command("packed", (*compress, "gptq4", "--export", "packed", "--set", "group=0", *some), checksums),
        Command("calibrate", ("calibrate", source, ..., "--text", folder / "texts", *some[2:]), checksums),
        Command("calibrate --gradients", ("calibrate", source, ..., *some, "--gradients", "token"), checksums),
        Command(
            "compare",
            ("compare", source, ..., "--methods", "svd", "--ratios", "0.4,0.6", *texts, "--windows", "2"),
            tables,
        ),
        Command(
            "recover",
            ("recover", small, ..., *texts, "--steps", "6", "--rows", "2", "--save-every", "2"),
            checksums,
        ),
        Command("convert --to dense", ("convert", small, ..., "--to", "dense"), checksums),
        Command("convert --to orbax", ("convert", source, ..., "--to", "orbax"), arrays),
        Command("convert --to safetensors", ("convert", orbax, ..., "--to", "safetensors"), checksums),
    ]


class Run:
    """A run of the program in a fork of this process.

    Args:
        words: the command line.
        point: so many operations on files it may do before it kills itself; None for all.
    """

    def __init__(self, words, point: int | None = None):
        self.words = [str(word) for word in words]
        self.log = Path(tempfile.mkstemp(suffix=".log")[1])
        self.begun = time.monotonic()
        self.process = os.fork()
        if not self.process:
            self._work(point)

    def _work(self, point: int | None) -> None:
        """Run the program, in the child."""
        code = 1
        try:
            with self.log.open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if point is not None:
                sys.addaudithook(_Countdown(point))
            sys.argv = ["jaxmoe", *self.words]
            jaxmoe.cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def end(self, after: float = LIMIT) -> int | None:
        """Return the exit code, -9 if the run had to be killed after so many seconds, None if it hung."""
        while (time.monotonic() - self.begun) < after:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(self.process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return None if after == LIMIT else code

    def said(self) -> str:
        """Return what the run printed, and forget it."""
        text = self.log.read_text(errors="replace")
        self.log.unlink()
        return text


class _Countdown:
    """An audit hook that ends the process, as SIGKILL does, before an operation on files.

    Reads are none: only what changes the disk counts.
    """

    CHANGES = frozenset(
        {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock", "shutil.rmtree"}
    )

    def __init__(self, left: int):
        self.left = left

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in self.CHANGES or (event == "open" and self._writes(arguments)):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _writes(arguments: tuple) -> bool:
        path, _, flags = arguments
        # The compiler's cache is no part of a run.
        own = not str(path).startswith((os.environ["JAX_COMPILATION_CACHE_DIR"], "/dev/", "/proc/"))
        return own and bool(flags and flags & (os.O_WRONLY | os.O_RDWR))


class Counts(NamedTuple):
    """What became of the kills of one command."""

    killed: int
    published: int
    finished: int
    problems: list[str]
    seconds: float


def hammer(command: Command, folder: Path, kills: int, draw: random.Random, *, points: bool) -> Counts:
    """Kill a command so many times (0 with points: once at each), finishing it whenever it was not hit."""
    begun = time.monotonic()
    name = command.name.replace(" ", "_")
    quiet, output = folder / f"{name}-quiet", folder / f"{name}-killed"
    words = [quiet if word is ... else word for word in command.words]
    # The first one compiles: the second tells how long a run takes.
    for _ in range(2):
        shutil.rmtree(quiet, ignore_errors=True)
        run = Run(words)
        if (code := run.end()) != 0:
            return Counts(0, 0, 0, [f"the quiet run ended {code}: {run.said()}"], time.monotonic() - begun)
    length = time.monotonic() - run.begun
    expected, problems = command.identity(quiet), []
    words = [output if word is ... else word for word in command.words]
    killed = published = finished = point = 0

    def whole(code: int | None, run: Run) -> bool:
        """Check that a run which was left alone ended well, and clear its output away."""
        if code != 0:
            problems.append(f"after {killed} kills (point {point}): exit code {code}: {run.said()[-500:]}")
        elif (found := command.identity(output)) != expected:
            different = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
            problems.append(f"after {killed} kills (point {point}): other bytes in {', '.join(different)}")
        for path in folder.glob(f"{name}-killed*"):
            shutil.rmtree(path)
        return code == 0

    while points or killed < kills:
        run = Run(words, point) if points else Run(words)
        code = run.end() if points else run.end(draw.uniform(0, length))
        if code == KILLED:
            killed += 1
            published += output.exists()
            if points:
                # Each point by itself: the next run is to end well at once.
                run = Run(words)
                whole(run.end(), run)
                point += 1
        else:
            finished += 1
            if not whole(code, run) or points:
                break
    else:
        run = Run(words)
        whole(run.end(), run)
    return Counts(killed, published, finished, problems, time.monotonic() - begun)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Kill every command at random moments.")
    parser.add_argument("--kills", type=int, default=200, help="in all, shared among the commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", action="store_true", help="kill at every operation on files instead")
    parser.add_argument("--only", default="", help="names of commands, separated by commas")
    options = parser.parse_args(arguments)
    draw = random.Random(options.seed)
    table = Table("command", "kills", "after its output had its name", "finished before", "problems", "seconds")
    total = bad = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        commands = prepare(folder)
        if only := options.only.split(",") if options.only else []:
            commands = [command for command in commands if command.name in only]
        for position, command in enumerate(commands):
            share = options.kills * (position + 1) // len(commands) - options.kills * position // len(commands)
            counts = hammer(command, folder, share, draw, points=options.points)
            numbers = (counts.killed, counts.published, counts.finished, len(counts.problems))
            table.add_row(command.name, *map(str, numbers), f"{counts.seconds:.0f}")
            total, bad = total + counts.killed, bad + len(counts.problems)
            print(command.name, *numbers, *counts.problems, sep="\n  ", flush=True)
    table.add_section()
    table.add_row("all", str(total), "", "", str(bad), "")
    Console(width=110).print(table)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
