"""The folder of a comparison: a record for everything that is finished, under a key of all that decides it.

    REPORT/index.html, table.md, table.csv, comparison.json     what was measured
    REPORT/statistics-1a2b3c4d                                  what was calibrated, for all cells
    REPORT/checkpoints/NAME-1a2b3c4d                            a cell at work, or kept
    REPORT/.jaxmoe/comparison.json                              of which checkpoint
    REPORT/.jaxmoe/records/KEY.json                             one finished record each

A record is written whole or not at all, and is never removed: a run that was killed resumes, and one with other
settings finds those that still apply.
"""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jaxmoe.checkpoint.atomic import remove, write_bytes
from jaxmoe.checkpoint.output import PARTIAL
from jaxmoe.checkpoint.records import read_record, read_sealed, sealed
from jaxmoe.checkpoint.workspace import JOURNAL, check_plain, fingerprint, locked, make_folder
from jaxmoe.compression.engine import STEPS
from jaxmoe.errors import StorageError
from jaxmoe.report.comparison_records import CellResult
from jaxmoe.report.records import Record

_CHECKPOINTS, _GOING = "checkpoints", ".going"
_MEND = "remove it, or choose another folder for the report"
_AGAIN = "remove it to have it measured again, or choose another folder for the report"
_DECIDES = ("method", "settings", "ratio", "of", "unit", "main_experts", "targets", "seed")
"""What tells the cells of one table from each other."""


T = TypeVar("T", bound=Record)


@dataclass(frozen=True)
class _Marker:
    source: str


class ComparisonFolder:
    """A comparison's folder, for one process at a time.

    Args:
        path: the folder, created where it is not there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records = self.path / JOURNAL / "records"

    @contextmanager
    def opened(self, source: str) -> Iterator[None]:
        """Open the folder for the length of a `with` block.

        Args:
            source: fingerprint of the checkpoint that is compared.

        Raises:
            StorageError: the folder holds something else or is of another checkpoint, or another run works in it.
        """
        journal = self.path / JOURNAL
        marker = journal / "comparison.json"
        if not os.path.lexists(marker) and self.path.exists() and any(p.name != JOURNAL for p in self.path.iterdir()):
            raise StorageError(f"{self.path} holds something that `jaxmoe compare` did not write: {_MEND}")
        if journal.is_symlink():
            raise StorageError(f"{journal} is a link, and a comparison makes a folder there: {_MEND}")
        check_plain(journal, _MEND)
        make_folder(self.records)
        with locked(journal / "compare.lock", f"another run is comparing in {self.path}: wait for it to end", _MEND):
            if not os.path.lexists(marker):
                write_bytes(marker, json.dumps({"source": source}).encode())
            elif read_record(marker, _Marker, _MEND).source != source:
                raise StorageError(f"{self.path} compares another checkpoint: {_MEND}")
            self.sweep()
            yield

    def find(self, key: str, kind: type[T]) -> T | None:
        """Return the record of that key, None where there is none.

        Raises:
            StorageError: there is something that no comparison writes.
        """
        path = self.records / f"{key}.json"
        return kind.read(read_sealed(path, _AGAIN)) if os.path.lexists(path) else None

    def add(self, key: str, record: T) -> T:
        """Keep a record and return it."""
        write_bytes(self.records / f"{key}.json", sealed(record.as_json()))
        return record

    def cells(self, contexts: Collection[str]) -> list[CellResult]:
        """Return all cells of some contexts, those of earlier runs too; of equal cells the newest."""
        paths = sorted(self.records.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        found = [read_sealed(path, _AGAIN) for path in paths]
        newest = {
            fingerprint({name: record.get(name) for name in _DECIDES}): record
            for record in found
            if record.get("context") in contexts
        }
        return [CellResult.read(record) for record in newest.values()]

    def checkpoint(self, name: str, key: str) -> Path:
        """Return where a cell's compressed checkpoint lies while it is needed."""
        return self.path / _CHECKPOINTS / f"{name}-{key[:8]}"

    def set_aside(self, checkpoint: Path) -> None:
        """Take a cell's compressed checkpoint, and what was made beside it, out of the way of `checkpoint`.

        A run that is killed while it removes them leaves nothing that looks like a checkpoint.
        """
        for path in (checkpoint.with_name(checkpoint.name + ending) for ending in ("", PARTIAL, STEPS)):
            if os.path.lexists(path):
                going = path.with_name(path.name + _GOING)
                remove(going)
                path.rename(going)

    def sweep(self) -> None:
        """Remove what was set aside."""
        for path in (self.path / _CHECKPOINTS).glob(f"*{_GOING}"):
            remove(path)
