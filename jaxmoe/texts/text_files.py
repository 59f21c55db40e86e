"""What a text file holds: text in UTF-8, or a JSON object in each line, decoded against a type.

Only regular files are opened, and what could not be turned into tokens later, such as half a surrogate pair in JSON, is
found here, where file and line are known.
"""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from jaxmoe.checkpoint.records import open_regular, unreadable
from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.errors import JaxmoeError

Record = TypeVar("Record")

_OTHERS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet table",
}
"""Other forms that texts come in, by their first bytes."""


def read_text(path: Path) -> tuple[str, str]:
    """Return a file's text, with line ends as Unix has them, and the SHA-256 of its bytes.

    Raises:
        JaxmoeError: there is no such regular file, or it is empty, binary or not UTF-8.
    """
    with open_regular(path) as file:
        try:
            content = file.read(1 << 16)
            if b"\0" in content:
                raise JaxmoeError(f"{path} is {_form(content, 'binary (it holds NUL bytes)')}: give text in UTF-8")
            content += file.read()
        except OSError as error:
            raise unreadable(path, error) from None
        except MemoryError:
            raise JaxmoeError(f"{path} does not fit into memory: give a part of it") from None
    if b"\0" in content:
        raise JaxmoeError(f"{path} is binary (it holds NUL bytes): give text in UTF-8")
    try:
        # A byte order mark is no part of the text, and line ends are those of Unix, as in Python's text files.
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        form = _form(content, f"not UTF-8 at byte {error.start} (line {content[: error.start].count(10) + 1})")
        raise JaxmoeError(f"{path} is {form}: convert it, or give a text file") from None
    if not text.strip():
        raise JaxmoeError(f"{path} is empty: give a file with text")
    return text, sha256(content).hexdigest()


def _form(content: bytes, otherwise: str) -> str:
    return next((form for start, form in _OTHERS.items() if content.startswith(start)), otherwise)


def json_lines(path: Path, text: str, kind: type[Record], form: str) -> Iterator[tuple[int, Record]]:
    """Yield the number and the record of every line that is not blank.

    Args:
        path: of the file, for messages.
        text: of the file.
        kind: a type that msgspec converts to; its `__post_init__` may refuse by `ValueError`.
        form: what a line is to be, for the message.

    Raises:
        JaxmoeError: lines are no JSON, do not fit, or hold what is no text; offenders are listed by line, after the
            last record.
    """
    problems: list[str] = []
    # Not splitlines: JSON strings may hold other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = msgspec.convert(_decoded(line), kind)
            # What cannot be encoded is no text; msgspec writes strictly UTF-8.
            msgspec.json.encode(record)
        except UnicodeEncodeError:
            problems.append(f"line {number}: half a surrogate pair (\\ud800 to \\udfff), which is no text")
        except RecursionError:
            problems.append(f"line {number}: nested too deep")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
        else:
            yield number, record
    if problems:
        raise JaxmoeError(f"{path}: {listing(problems, 5)}; {form}")


def _decoded(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
