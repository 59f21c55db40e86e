"""Small files that a program wrote and anyone may have changed since: opened safely, decoded against a type.

Only regular files are opened: a pipe or a device where a file is expected would be waited for without end. What a file
holds is described once, as a dataclass or msgspec type; msgspec checks it and names the first place that does not fit
(`Expected `int`, got `str` - at `$.layers[2].rank``).
"""

import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from hashlib import sha256
from io import BufferedReader
from pathlib import Path
from types import GenericAlias
from typing import Any, TypeVar

import msgspec

from jaxmoe.errors import StorageError

Record = TypeVar("Record")

LARGEST = 1 << 30
"""Bytes of the largest file that is read as one record: anything above is none, and would fill the memory."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file for reading.

    Raises:
        StorageError: there is no such file, it is not a regular one (a folder, pipe, socket or device), or it cannot be
            read.

    Example:
        >>> open_regular("/dev/null")
        Traceback (most recent call last):
            ...
        jaxmoe.errors.StorageError: /dev/null is not a regular file but a device: put the file itself there
    """
    try:
        # Opening a pipe waits for a writer, unless asked not to.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise StorageError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise StorageError(f"{path} is not a regular file but a {file_kind(mode)}: put the file itself there")
    return open(descriptor, "rb")


def unreadable(path: str | Path, error: OSError | ValueError) -> StorageError:
    """Return the error for a path that the system refuses; for a pipe or socket it says which.

    Example:
        >>> unreadable("a", PermissionError(13, "Permission denied"))
        StorageError('a cannot be read: Permission denied')
    """
    if isinstance(error, OSError) and error.errno == errno.ENXIO:
        return StorageError(f"{path} is not a regular file but a socket or device: put the file itself there")
    return StorageError(f"{path!s} cannot be read: {getattr(error, 'strerror', None) or error}")


def file_kind(mode: int) -> str:
    """Return what a file that is not regular is, by the mode that `os.stat` gives."""
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket", stat.S_ISLNK: "link"}
    return next((name for test, name in kinds.items() if test(mode)), "device")


def read_bytes(path: str | Path, *, limit: int = LARGEST) -> bytes:
    """Return what a regular file holds.

    Raises:
        StorageError: as `open_regular`, or the file is larger than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise StorageError(f"{path} has {size} bytes, and no such file has more than {limit}: it is something else")
        try:
            return file.read()
        except OSError as error:
            raise unreadable(path, error) from None


def read_record(path: str | Path, kind: type[Record] | GenericAlias, mend: str) -> Record:
    """Return the record that a JSON file holds.

    Args:
        path: of the file.
        kind: a type that msgspec decodes; `dict[str, Any]` for any JSON object.
        mend: what to do where the file is missing or does not fit.

    Raises:
        StorageError: the file is missing, not regular, no JSON, or holds something else; the message names the place.
    """
    try:
        content = read_bytes(path)
    except StorageError as error:
        raise StorageError(f"{error}: {mend}") from None
    try:
        # Not msgspec's own decoder: configs hold infinite numbers, which are no JSON, as Python and transformers write.
        value = json.loads(content)
        if _SURROGATE.search(content):
            # Half a letter is none: nothing could write, print or compare such text.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _half(error, str(path), mend) from None
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not JSON ({error}): {mend}") from None
    return as_record(value, kind, str(path), mend)


def _half(error: UnicodeEncodeError, where: str, mend: str) -> StorageError:
    half = f"{error.object[error.start]!a} is half a character"
    return StorageError(f"{where} does not hold what it should ({half}): {mend}")


def as_record(value: Any, kind: type[Record] | GenericAlias, where: str, mend: str) -> Record:
    """Return decoded JSON as a record.

    Args:
        value: dictionaries, lists, text and numbers, as `json.loads` gives them.
        kind: a type that msgspec converts to.
        where: what holds the value, for the message.
        mend: what to do where it does not fit.

    Raises:
        StorageError: the value does not fit; the message names the place.

    Example:
        >>> as_record({"rank": "3"}, dict[str, int], "spec.json", "write it again")
        Traceback (most recent call last):
            ...
        jaxmoe.errors.StorageError: spec.json does not hold what it should (Expected `int`, got `str` - at `$[...]`)...
    """
    try:
        # Keys of JSON are text, also where a type wants numbers.
        return msgspec.convert(value, kind, str_keys=True)
    except UnicodeEncodeError as error:
        raise _half(error, where, mend) from None
    except (msgspec.ValidationError, RecursionError) as error:
        raise StorageError(f"{where} does not hold what it should ({error}): {mend}") from None


class Sealed(msgspec.Struct):
    """A record with the SHA-256 of its JSON text: whoever changes one without the other is found out."""

    seal: str
    record: dict[str, Any]


def sealed(record: Mapping[str, Any]) -> bytes:
    """Return the content of a file that holds a record and its seal, for `read_sealed`."""
    return json.dumps({"seal": seal(record), "record": record}).encode()


def read_sealed(path: str | Path, mend: str) -> dict[str, Any]:
    """Return a record that `sealed` wrote, just as it was written.

    Args:
        path: of the file.
        mend: what to do where it is something else.

    Raises:
        StorageError: the file is not regular, holds something else, or was changed.
    """
    found = read_record(path, Sealed, mend)
    if found.seal != seal(found.record):
        raise StorageError(f"{path} was changed since it was written: {mend}")
    return found.record


def seal(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record's JSON text, the same before it was written and after it was read."""
    return sha256(json.dumps(record).encode()).hexdigest()
