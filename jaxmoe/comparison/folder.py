"""The folder of a comparison: a record for everything that is finished, under a key of all that decides it.

    REPORT/index.html, table.md, table.csv, comparison.json     what was measured
    REPORT/statistics-1a2b3c4d                                  what was calibrated, for all cells
    REPORT/checkpoints/NAME-1a2b3c4d                            a cell at work, or kept
    REPORT/.jaxmoe/comparison.json                              of which checkpoint
    REPORT/.jaxmoe/records/KEY.json                             one finished record each

A record is written whole or not at all, and is never removed: a run that was killed goes on, and one with other
settings finds those that still apply.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jaxmoe.checkpoint.atomic import write_bytes
from jaxmoe.checkpoint.workspace import JOURNAL, fingerprint
from jaxmoe.errors import JaxmoeError

_DECIDES = ("method", "settings", "ratio", "of", "main_experts", "seed")
"""What tells the cells of one table from each other."""


class ComparisonFolder:
    """A comparison's folder, for one process at a time.

    Args:
        path: the folder, created where it is not there.
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        self.records = self.path / JOURNAL / "records"

    @contextmanager
    def opened(self, source: str) -> Iterator[None]:
        """Open the folder for the length of a `with` block.

        Args:
            source: fingerprint of the checkpoint that is compared.

        Raises:
            JaxmoeError: the folder holds something else or is of another checkpoint, or another run works in it.
        """
        marker = self.path / JOURNAL / "comparison.json"
        mend = "remove it, or choose another folder"
        if self.path.exists() and not self.path.is_dir():
            raise JaxmoeError(f"{self.path} is a file: {mend} for the report")
        if not marker.exists() and self.path.exists() and any(p.name != JOURNAL for p in self.path.iterdir()):
            raise JaxmoeError(f"{self.path} holds something that `jaxmoe compare` did not write: {mend}")
        self.records.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / JOURNAL / "compare.lock", timeout=0)
        try:
            with lock:
                if marker.exists():
                    if json.loads(marker.read_bytes())["source"] != source:
                        raise JaxmoeError(f"{self.path} compares another checkpoint: {mend}")
                else:
                    write_bytes(marker, json.dumps({"source": source}).encode())
                yield
        except Timeout:
            raise JaxmoeError(f"another run is comparing in {self.path}: wait for it to end") from None

    def find(self, key: str) -> dict[str, Any] | None:
        """Return the record of that key, None where there is none."""
        try:
            return json.loads((self.records / f"{key}.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def add(self, key: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a record and return it."""
        write_bytes(self.records / f"{key}.json", json.dumps(record).encode())
        return dict(record)

    def cells(self, contexts: Collection[str]) -> list[dict[str, Any]]:
        """Return the records of all cells of some contexts, those of earlier runs too; of equal cells the newest."""
        paths = sorted(self.records.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        found = [json.loads(path.read_bytes()) for path in paths]
        newest = {
            fingerprint({name: record.get(name) for name in _DECIDES}): record
            for record in found
            if record.get("context") in contexts
        }
        return list(newest.values())

    def checkpoint(self, name: str, key: str) -> Path:
        """Return where a cell's compressed checkpoint lies while it is needed."""
        return self.path / "checkpoints" / f"{name}-{key[:8]}"
