"""The saved states of a training run on disk: each is whole and unchanged, or not used.

    FOLDER/<step>/       an Orbax checkpoint of the state's arrays
    FOLDER/<step>.json   the checksum of each of its files; written last, so that a state without it was never finished

Training resumes to the same numbers from any of its states. So a newest state that was damaged costs the steps since
the one before it, from which the run resumes, and says so; only where none can be used does it stop.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from jaxmoe.checkpoint.array_folder import check_files, file_checksums, load_arrays, save_arrays
from jaxmoe.checkpoint.atomic import remove, write_bytes
from jaxmoe.checkpoint.records import read_record
from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.errors import JaxmoeError

_MEND = "start over with --no-resume"


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """What stands in `<step>.json`."""

    sha256: Annotated[dict[str, str], msgspec.Meta(min_length=1)]


class Found(NamedTuple):
    """A state that was read.

    Args:
        step: steps done.
        arrays: by name.
        damaged: why newer states could not be used, one sentence each.
    """

    step: int
    arrays: dict[str, Any]
    damaged: tuple[str, ...]


class States:
    """The folder of a run's states.

    Args:
        folder: is created if there is none.
        keep: so many states remain.

    Raises:
        JaxmoeError: something else stands in its place.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise JaxmoeError(f"{folder} is no folder of saved states: {_MEND}")
        folder.mkdir(exist_ok=True)

    def steps(self) -> list[int]:
        """Return the steps of all finished states, in ascending order."""
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdecimal())

    def newest(self, abstract: Mapping[str, Any], logged: int) -> Found | None:
        """Return the newest state that can be used, None where none was ever finished.

        Args:
            abstract: name to something with the shape, dtype and sharding of an array.
            logged: steps whose metrics are there: a later state could not say how it was reached.

        Raises:
            JaxmoeError: there are states, but none can be used.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                if step > logged:
                    raise JaxmoeError(f"the metrics of {self.folder.parent} end at step {logged}, before state {step}")
                return Found(step, self._read(step, abstract), tuple(damaged))
            except JaxmoeError as error:
                damaged.append(str(error))
        if damaged:
            raise JaxmoeError(f"no saved state of this run can be used: {listing(damaged)}; {_MEND}")
        return None

    def _read(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        unusable = "the state cannot be used"
        entry = read_record(self._entry(step), _Entry, unusable)
        try:
            check_files(self._place(step), entry.sha256)
        except JaxmoeError as error:
            raise JaxmoeError(f"{error}, {unusable}") from None
        return load_arrays(self._place(step), abstract, unusable)

    def save(self, step: int, arrays: Mapping[str, Any]) -> None:
        """Save a state, and remove those that are not to remain.

        Raises:
            JaxmoeError: it cannot be written; those before it remain.
        """
        remove(self._entry(step))
        remove(self._place(step))
        save_arrays(self._place(step), arrays)
        entry = _Entry(file_checksums(self._place(step)))
        write_bytes(self._entry(step), msgspec.json.encode(entry))
        for old in self.steps()[: -max(1, self.keep)]:
            remove(self._entry(old))
        # States without an entry: those just removed, and what killed runs left behind.
        finished = set(self.steps())
        for path in list(self.folder.iterdir()):
            if path.suffix != ".json" and not (path.name.isdecimal() and int(path.name) in finished):
                remove(path)

    def _place(self, step: int) -> Path:
        return self.folder / str(step)

    def _entry(self, step: int) -> Path:
        return self.folder / f"{step}.json"
