"""Text files, each a domain: plain text, a folder of plain texts, or JSON lines with a `text` field.

What is wrong with any of the files is found before anything is computed, and said at once.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.errors import JaxmoeError

JSON_LINES = (".jsonl", ".ndjson", ".json")
"""Suffixes of files that hold one JSON object in each line."""


class Text(NamedTuple):
    """A domain of text.

    Args:
        name: the file's name without its suffix.
        path: the file.
        documents: its text, whole, or that of every JSON line.
        fingerprint: SHA-256 of the file.
    """

    name: str
    path: Path
    documents: tuple[str, ...]
    fingerprint: str


def read_texts(paths: Sequence[str | Path]) -> tuple[Text, ...]:
    """Read text files.

    Args:
        paths: text files, folders (every `*.txt` in them) or JSON-lines files, whose lines are documents.

    Raises:
        JaxmoeError: a file is missing, empty, not text, or lacks a `text`, or two have one name; all offenders are
            listed.

    Example:
        >>> from jaxmoe.data import demo_texts
        >>> [text.name for text in read_texts(demo_texts()[:2])]
        ['code', 'literature']
    """
    if not paths:
        raise JaxmoeError("no text: give at least one text file, folder of *.txt or JSON-lines file")
    files, problems = _files([Path(path).expanduser() for path in paths])
    texts: list[Text] = []
    for path in files:
        try:
            texts.append(_read(path))
        except JaxmoeError as error:
            problems.append(str(error))
    names = [path.stem for path in files]
    for name in sorted({name for name in names if names.count(name) > 1}):
        same = ", ".join(str(path) for path in files if path.stem == name)
        problems.append(f"{same} are all called {name!r}: rename all but one, results are kept by name")
    if problems:
        raise JaxmoeError(listing(problems))
    return tuple(texts)


def _files(paths: list[Path]) -> tuple[list[Path], list[str]]:
    files: list[Path] = []
    problems: list[str] = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.txt"))
            files += found
            if not found:
                problems.append(f"{path} has no *.txt file: put texts there, or name the files")
        elif path.is_file():
            files.append(path)
        else:
            problems.append(f"{path} does not exist: mend the path of the text")
    return files, problems


def _read(path: Path) -> Text:
    if path.stem.startswith("."):
        raise JaxmoeError(f"{path} begins with a dot, and results are kept by name: rename the file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JaxmoeError(f"{path} cannot be read: {error.strerror or error}") from error
    if b"\0" in content:
        raise JaxmoeError(f"{path} is binary (it holds NUL bytes): give text in UTF-8")
    try:
        # A byte order mark is no part of the text, and line ends are those of Unix, as in Python's text files.
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise JaxmoeError(f"{path} is not UTF-8 at byte {error.start}: convert it, or give a text file") from error
    if not text.strip():
        raise JaxmoeError(f"{path} is empty: give a file with text")
    documents = _documents(path, text) if path.suffix.lower() in JSON_LINES else (text,)
    return Text(path.stem, path, documents, sha256(content).hexdigest())


def _documents(path: Path, text: str) -> tuple[str, ...]:
    documents: list[str] = []
    problems: list[str] = []
    # Not splitlines: JSON strings may hold other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            problems.append(f"line {number} is no JSON")
            continue
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            problems.append(f"line {number} has no string `text`")
        elif record["text"]:
            documents.append(record["text"])
    if problems:
        raise JaxmoeError(f"{path}: {listing(problems, 5)}; each line is to be an object with a field `text`")
    if not documents:
        raise JaxmoeError(f"{path} is empty: every `text` in it is")
    return tuple(documents)
