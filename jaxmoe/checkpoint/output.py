"""Where a run may write: one check of the folder to create, before anything is read at length or written.

A path is fit if the system takes its name and those of the folders beside it (`OUTPUT.partial`), if something can be
made there, and if it neither lies in a folder that the run reads nor holds one, whatever links lead there.
"""

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile

from jaxmoe.checkpoint.records import file_kind
from jaxmoe.errors import StorageError

PARTIAL = ".partial"
"""What the name of a folder ends in while it is being made."""

MEND = "choose another folder"
_BENEATH = 256
"""Letters of the longest path within an output folder, with room to spare."""


def output_folder(
    path: str | Path,
    reads: Iterable[str | Path | None] = (),
    *,
    beside: Sequence[str] = (PARTIAL,),
    into: bool = False,
) -> Path:
    """Return the absolute path of a folder that a run may create.

    Args:
        path: as the user gave it.
        reads: folders and files that the run reads; None and what does not exist, such as a hub id, are left out.
        beside: what the names of the folders that the run makes beside it end in.
        into: whether the run writes into the folder where it exists already.

    Raises:
        StorageError: the path names no folder of its own, lies below a file, at the end of a link that leads nowhere,
            or where nothing can be written; a name is too long or not Unicode; or it overlaps with what is read.

    Example:
        >>> output_folder("/dev/null/small")
        Traceback (most recent call last):
            ...
        jaxmoe.errors.StorageError: /dev/null is a device, and /dev/null/small needs a folder there: choose another ...
    """
    folder = _named(path)
    place = _nearest(folder)
    _check_lengths(folder, place, max(beside, key=len, default=""))
    made = [folder, *(folder.with_name(folder.name + ending) for ending in beside)]
    for read in reads:
        if read is not None and os.path.exists(read):
            _check_apart(made, Path(read))
    if into or place != folder:
        try:
            # Asked, not looked up: what the mode of a folder allows says nothing of disks that cannot be written.
            with TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise StorageError(f"{place} cannot be written to ({error.strerror or error}): {MEND}") from error
    return folder


def _named(path: str | Path) -> Path:
    """Return an absolute path with a name of its own."""
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise StorageError(f"{text!a} is not valid Unicode, as reports have to be: {MEND}") from None
    if "\0" in text:
        raise StorageError(f"{text!r} has a null character, which no path can have: {MEND}")
    try:
        folder = Path(text).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{text}: {error}: {MEND}") from None
    if folder.name in ("", ".."):
        raise StorageError(f"{text!r} names no folder of its own: give the name of the folder to create")
    try:
        return folder.absolute()
    except OSError as error:
        raise StorageError(f"the current folder is gone ({error.strerror}): change to another") from error


def _nearest(folder: Path) -> Path:
    """Return the nearest folder above that exists, or the folder itself."""
    for place in (folder, *folder.parents):
        try:
            mode = os.stat(place).st_mode
        except OSError as error:
            if os.path.islink(place):
                raise StorageError(f"{place} is a link that leads nowhere: remove it, or {MEND}") from None
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise StorageError(f"{place} cannot be reached ({error.strerror or error}): {MEND}") from error
            if place.name == "..":
                raise StorageError(f"{place.parent} does not exist, so nothing lies above it: {MEND}") from None
            continue
        if not stat.S_ISDIR(mode):
            kind = "file" if stat.S_ISREG(mode) else file_kind(mode)
            if place == folder:
                raise StorageError(f"{place} is a {kind}, and a folder is to be made there: {MEND}")
            raise StorageError(f"{place} is a {kind}, and {folder} needs a folder there: {MEND}")
        return place
    raise StorageError(f"{folder} cannot be reached: {MEND}")


def _check_lengths(folder: Path, place: Path, ending: str) -> None:
    """Raise if a name or the whole path is longer than the disk of an existing folder above allows."""
    longest, whole = _limit(place, "PC_NAME_MAX", 255), _limit(place, "PC_PATH_MAX", 4096)
    *above, own = folder.relative_to(place).parts or (folder.name,)
    for name, end in (*((name, "") for name in above), (own, ending)):
        if (over := len(os.fsencode(name + end)) - longest) > 0:
            raise StorageError(f"{name}{end} has {over} letters too many for the disk: give a shorter name")
    if len(os.fsencode(folder)) + _BENEATH > whole:
        raise StorageError(f"{folder} is too long for a path: {MEND}, nearer to the root")


def _limit(place: Path, name: str, usual: int) -> int:
    try:
        found = os.pathconf(place, name)
    except (OSError, ValueError):
        return usual
    return found if found > 0 else usual


def _check_apart(made: Sequence[Path], read: Path) -> None:
    """Raise if a folder that will be made lies in something that is read, is that, or holds it."""
    for folder in made:
        if _holds(read, folder):
            place = (
                "is what this run reads" if os.path.realpath(folder) == os.path.realpath(read) else f"lies in {read}"
            )
            raise StorageError(f"{folder} {place}: nothing is ever written to what is read; {MEND}, outside of it")
        if _holds(folder, read):
            raise StorageError(f"{read} is to be read, and lies in {folder}, where the run works: {MEND}")


def _holds(outer: Path, inner: Path) -> bool:
    """Return whether a path leads into a folder or to the folder itself, links and mounts resolved."""
    if not os.path.exists(outer):
        return False
    real = Path(os.path.realpath(inner))
    return any(place.exists() and os.path.samefile(place, outer) for place in (real, *real.parents))
