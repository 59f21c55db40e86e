"""The folder of a run that is not finished: what is done, by whom, and how it becomes the output.

    OUTPUT.partial/                 becomes OUTPUT by one rename, when complete
      model-layer00003.safetensors  a finished layer, written under a temporary name and renamed
      .jaxmoe/run.json              what this run computes: its fingerprints
      .jaxmoe/layer00003.json       the journal entry of a finished layer: its key and checksum
      .jaxmoe/layer00003.lock       held by the process that works on the layer

A unit of work, here a layer, counts as finished when its entry carries the key of this run and its file the checksum of
the entry. Runs over disjoint units may share the folder; whoever finishes last publishes. What the units are and where
their files lie is up to the caller: `Workspace` takes a function from a unit to its name and file.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from jaxmoe.checkpoint.atomic import sync_folder, write_bytes
from jaxmoe.errors import JaxmoeError

JOURNAL = ".jaxmoe"


def fingerprint(record: Mapping[str, Any]) -> str:
    """Return the sha256 of a JSON record, independent of the order of its keys.

    Example:
        >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
        True
    """
    return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def layer_file(index: int) -> str:
    """Return the file name of a layer.

    Example:
        >>> layer_file(3)
        'model-layer00003.safetensors'
    """
    return f"model-layer{index:05d}.safetensors"


class Unit(NamedTuple):
    """A unit of work: its name in the journal, and its file relative to the folder."""

    name: str
    file: str


def layer_unit(index: int) -> Unit:
    """Return the unit that a layer of a checkpoint is."""
    return Unit(f"layer{index:05d}", layer_file(index))


class Workspace:
    """The folder of a run in progress, `OUTPUT.partial`, for one process.

    Args:
        output: the final folder.
        run: JSON record of everything that decides the result: a folder begun with another record is refused.
        unit: maps what the caller calls a unit to its name and file; layers of a checkpoint by default.
    """

    def __init__(self, output: Path, run: Mapping[str, Any], unit: Callable[[Any], Unit] = layer_unit):
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.journal = self.folder / JOURNAL
        self.run = dict(run)
        self.unit = unit
        self.locks = ExitStack()

    def open(self, units: Iterable[Any], *, resume: bool = True) -> None:
        """Create or reopen the folder and take the locks of the units that this process will work on.

        Raises:
            JaxmoeError: the folder belongs to a run with other settings, or another process holds one of the units.
        """
        units = list(units)
        begun = self.journal / "run.json"
        if not resume and self.folder.exists():
            with ExitStack() as stack:
                # Whoever still works here must not lose the folder under its feet.
                for lock in sorted(self.journal.glob("*.lock")):
                    stack.enter_context(self._lock(lock))
                shutil.rmtree(self.folder)
        if self.folder.exists() and not begun.exists() and any(p.name != JOURNAL for p in self.folder.iterdir()):
            raise JaxmoeError(
                f"{self.folder} holds something that jaxmoe did not begin: remove it, or choose another output folder"
            )
        self.journal.mkdir(parents=True, exist_ok=True)
        if begun.exists():
            self._check_same(begun)
        else:
            write_bytes(begun, json.dumps(self.run, indent=2, sort_keys=True).encode())
        for unit in units:
            self.locks.enter_context(self._lock(self.journal / f"{self.unit(unit).name}.lock"))

    def _lock(self, path: Path, mend: str = "wait for it to end, or give the runs disjoint --layers") -> FileLock:
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise JaxmoeError(f"another run is working on {path.stem} in {self.folder}: {mend}") from None
        return lock

    def exclusive(self, name: str) -> FileLock:
        """Return a lock that one process of the run can hold at a time."""
        return self._lock(self.journal / f"{name}.lock", "wait for it to end")

    def _check_same(self, begun: Path) -> None:
        try:
            before = json.loads(begun.read_bytes())
        except ValueError:
            raise JaxmoeError(f"{begun} is not readable JSON: remove {self.folder}, or run with --no-resume") from None
        if before == json.loads(json.dumps(self.run)):
            return
        names = sorted(k for k in before.keys() | self.run.keys() if before.get(k) != self.run.get(k))
        changed = ", ".join(f"{k} (was {before.get(k)!r}, now {self.run.get(k)!r})" for k in names)
        raise JaxmoeError(
            f"{self.folder} was begun with other settings: {changed}; "
            "run with those, choose another output folder, or start over with --no-resume"
        )

    @contextmanager
    def opened(self, units: Iterable[Any], *, resume: bool = True) -> Iterator[None]:
        """Open the folder for the length of a `with` block, then release the locks."""
        try:
            self.open(units, resume=resume)
            yield
        finally:
            self.locks.close()

    def check_free(self) -> None:
        """Raise if something stands where the output is to be."""
        if self.output.exists():
            raise JaxmoeError(f"{self.output} exists: remove it, or choose another output folder")

    def entry(self, unit: Any, key: str) -> dict[str, Any] | None:
        """Return the journal entry of a unit that is finished and whole, else None."""
        name, path = self.unit(unit)
        try:
            entry = json.loads((self.journal / f"{name}.json").read_bytes())
            with (self.folder / path).open("rb") as file:
                whole = entry["key"] == key and entry["sha256"] == file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return entry if whole else None

    def finish(self, unit: Any, key: str, checksum: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Journal a unit whose file is written."""
        entry = {"key": key, "sha256": checksum, **record}
        write_bytes(self.journal / f"{self.unit(unit).name}.json", json.dumps(entry).encode())
        return entry

    def publish(self) -> None:
        """Give the complete folder its final name.

        The journal goes last: a process killed in between leaves a complete output with a journal that the next run
        removes.
        """
        self.check_free()
        for leftover in self.folder.rglob(".*.part"):
            leftover.unlink()
        os.rename(self.folder, self.output)
        sync_folder(self.output.parent)
        sweep(self.output)


def finished(output: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the report of an output that this very run has completed before, None where there is no output.

    Raises:
        JaxmoeError: the output is another run's, or none that jaxmoe wrote.
    """
    if not output.exists():
        return None
    try:
        report = json.loads((output / "report.json").read_bytes())
        same = report["run"] == json.loads(json.dumps(run))
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise JaxmoeError(f"{output} exists and holds something else: remove it, or choose another output folder")
    sweep(output)
    return report


def sweep(output: Path) -> None:
    """Remove what a process killed while publishing may have left in a complete output."""
    shutil.rmtree(output / JOURNAL, ignore_errors=True)
