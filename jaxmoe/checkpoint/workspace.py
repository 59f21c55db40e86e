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
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from jaxmoe.checkpoint.atomic import remove, sync_folder, unwritten, write_bytes
from jaxmoe.checkpoint.output import MEND, PARTIAL
from jaxmoe.checkpoint.records import file_kind, open_regular, read_record, read_sealed, seal, sealed
from jaxmoe.errors import StorageError, shortened

JOURNAL, REPORT = ".jaxmoe", "report.json"
START_OVER = "remove it, or start over with --no-resume"


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
        self.folder = output.with_name(output.name + PARTIAL)
        self.journal = self.folder / JOURNAL
        self.run = dict(run)
        self.unit = unit
        self.locks = ExitStack()

    def open(self, units: Iterable[Any], *, resume: bool = True) -> None:
        """Create or reopen the folder and take the locks of the units that this process will work on.

        Args:
            units: that this process will work on.
            resume: whether to resume from what the folder holds; False starts over.

        Raises:
            StorageError: the folder belongs to a run with other settings or to something else, holds what no run makes,
                or another process holds one of the units.
        """
        begun = self.journal / "run.json"
        self._check_own()
        if not resume and self.folder.exists():
            self._remove()
        if self.folder.exists():
            check_plain(self.folder, START_OVER)
        make_folder(self.journal)
        if os.path.lexists(begun):
            self._check_same(begun)
        else:
            # A run killed here has left nothing, or a file without its name.
            held = (path for path in (*self.folder.iterdir(), *self.journal.iterdir()) if path != self.journal)
            if not all(path.name.endswith(".part") for path in held):
                raise StorageError(f"{self.folder} lacks {begun.name}, which says of which run it is: {START_OVER}")
            write_bytes(begun, json.dumps(self.run, indent=2, sort_keys=True).encode())
        for unit in units:
            self.locks.enter_context(self._lock(self.journal / f"{self.unit(unit).name}.lock"))

    def _check_own(self) -> None:
        """Raise unless the folder is one that a run began, empty, or not there: anything else is not ours to change."""
        if self.folder.is_symlink():
            raise StorageError(f"{self.folder} is a link, and a run makes a folder there: remove the link, or {MEND}")
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise StorageError(f"{self.folder} is a file, and a run makes a folder there: remove it, or {MEND}")
        if not os.path.lexists(self.journal) and any(self.folder.iterdir()):
            raise StorageError(f"{self.folder} holds something that jaxmoe did not begin: remove it, or {MEND}")

    def _remove(self) -> None:
        """Remove what an earlier run left, unless somebody still works there."""
        with ExitStack() as stack:
            # Never through a link: what it leads to is somebody else's.
            locks = [] if self.journal.is_symlink() else sorted(self.journal.glob("*.lock"))
            for lock in locks:
                if stat.S_ISREG(lock.lstat().st_mode):
                    stack.enter_context(self._lock(lock))
            remove(self.folder)

    def _lock(self, path: Path, mend: str = "wait for it to end, or give the runs disjoint --layers"):
        return locked(path, f"another run is working on {path.stem} in {self.folder}: {mend}", START_OVER)

    def exclusive(self, name: str) -> AbstractContextManager[None]:
        """Return a lock that one process of the run can hold at a time."""
        return self._lock(self.journal / f"{name}.lock", "wait for it to end")

    def _check_same(self, begun: Path) -> None:
        before = read_record(begun, dict[str, Any], START_OVER)
        if before == json.loads(json.dumps(self.run)):
            return
        names = sorted(k for k in before.keys() | self.run.keys() if before.get(k) != self.run.get(k))
        values = ((name, *(shortened(repr(run.get(name))) for run in (before, self.run))) for name in names)
        changed = ", ".join(f"{name} (was {was}, now {now})" for name, was, now in values)
        raise StorageError(
            f"{self.folder} was begun with other settings: {changed}; run with those, {MEND}, or start over with"
            " --no-resume"
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
        if os.path.lexists(self.output):
            raise StorageError(f"{self.output} exists: remove it, or {MEND}")

    def entry(self, unit: Any, key: str) -> dict[str, Any] | None:
        """Return the journal entry of a unit that is finished and whole, else None.

        Raises:
            StorageError: the entry or the file is something that no run writes.
        """
        name, path = self.unit(unit)
        journaled, file = self.journal / f"{name}.json", self.folder / path
        for made in (journaled, file):
            if os.path.lexists(made) and not stat.S_ISREG(mode := made.lstat().st_mode):
                raise StorageError(f"{made} is a {file_kind(mode)}, and a run writes a file there: {START_OVER}")
        if not journaled.exists() or not file.exists():
            return None
        entry = read_sealed(journaled, f"remove it to have {name} done again, or {START_OVER}")
        if entry.get("key") != key:
            return None
        with open_regular(file) as content:
            return entry if entry.get("sha256") == file_digest(content, "sha256").hexdigest() else None

    def finish(self, unit: Any, key: str, checksum: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Journal a unit whose file is written."""
        entry = {"key": key, "sha256": checksum, **record}
        write_bytes(self.journal / f"{self.unit(unit).name}.json", sealed(entry))
        return entry

    def publish(self) -> None:
        """Give the complete folder its final name.

        The journal goes last: a process killed in between leaves a complete output with a journal that the next run
        removes.
        """
        self.check_free()
        for leftover in self.folder.rglob(".*.part"):
            leftover.unlink()
        try:
            os.rename(self.folder, self.output)
            sync_folder(self.output.parent)
        except OSError as error:
            raise unwritten(self.output, error) from error
        sweep(self.output)


def finished(output: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the report of an output that this very run has completed before, None where there is no output.

    Raises:
        StorageError: the output is another run's, or none that jaxmoe wrote; or its report was changed.
    """
    if not output.exists():
        return None
    mend = f"remove it, or {MEND}"
    try:
        report = read_record(output / REPORT, dict[str, Any], mend)
    except StorageError:
        report = {}
    if report.get("run") != json.loads(json.dumps(run)):
        raise StorageError(f"{output} exists and holds something else: {mend}")
    if report.pop("seal", None) != (own := seal(report)):
        raise StorageError(f"{output} exists, and its {REPORT} was changed since it was written: {mend}")
    sweep(output)
    return {**report, "seal": own}


def sweep(output: Path) -> None:
    """Remove what a process killed while publishing may have left in a complete output."""
    shutil.rmtree(output / JOURNAL, ignore_errors=True)


@contextmanager
def locked(path: Path, taken: str, mend: str) -> Iterator[None]:
    """Hold a lock, which one process can at a time, for the length of a `with` block.

    Args:
        path: of the lock's file.
        taken: what to say where another process holds it.
        mend: what to do where something else is in its place.

    Raises:
        StorageError: another process holds it, something else is there, or it cannot be written.
    """
    if os.path.lexists(path) and not stat.S_ISREG(mode := path.lstat().st_mode):
        raise StorageError(f"{path} is a {file_kind(mode)}, and a run locks a file there: {mend}")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StorageError(taken) from None
    except OSError as error:
        raise unwritten(path, error) from error
    try:
        yield
    finally:
        lock.release()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        StorageError: something else is in the way, or the system does not let it be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritten(folder, error) from error


def check_plain(folder: Path, mend: str) -> None:
    """Raise unless everything in a folder, however deep, is a file or a folder: jaxmoe makes no links and no pipes.

    Raises:
        StorageError: something else is there, which nothing may be written or removed through.
    """
    for parent, folders, names in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *names)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue  # Another process of the same run gave it its name just now.
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise StorageError(f"{path} is a {file_kind(mode)}, and jaxmoe makes only files and folders: {mend}")
