"""Text files, each a domain: plain text, a folder of plain texts, or JSON lines with a `text` field.

What is wrong with any of the files is found before anything is computed, and said at once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from jaxmoe.checkpoint.records import unreadable
from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts.text_files import json_lines, read_text

JSON_LINES = (".jsonl", ".ndjson", ".json")
"""Suffixes of files that hold one JSON object in each line."""

Paths = str | Path | Sequence[str | Path]
"""One text file, folder or JSON-lines file, or several."""


def paths(given: Paths | None) -> tuple[str | Path, ...]:
    """Return the paths of what may be one or several; none for None.

    Example:
        >>> paths("code.txt"), paths(["code.txt", "law.txt"]), paths(None)
        (('code.txt',), ('code.txt', 'law.txt'), ())
    """
    if given is None:
        return ()
    return (given,) if isinstance(given, str | Path) else tuple(given)


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
        JaxmoeError: a file is missing, not a regular one, empty, not text, or lacks a `text`, or two have one name; all
            offenders are listed.

    Example:
        >>> from jaxmoe.data import demo_texts
        >>> [text.name for text in read_texts(demo_texts()[:2])]
        ['code', 'literature']
    """
    if not paths:
        raise JaxmoeError("no text: give at least one text file, folder of *.txt or JSON-lines file")
    files: list[Path] = []
    texts: list[Text] = []
    problems: list[str] = []
    for path in paths:
        try:
            files += _files(at_home(path))
        except JaxmoeError as error:
            problems.append(str(error))
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


def at_home(path: str | Path) -> Path:
    """Return a path whose `~` stands for the home folder, where there is one."""
    return Path(os.path.expanduser(path))


def _files(path: Path) -> list[Path]:
    # Not Path.is_dir, which raises for names that the system does not take.
    if not os.path.isdir(path):
        return [path]
    try:
        names = sorted(name for name in os.listdir(path) if name.endswith(".txt"))
    except OSError as error:
        raise unreadable(path, error) from None
    if not names:
        raise JaxmoeError(f"{path} has no *.txt file: put texts there, or name the files")
    return [path / name for name in names]


class _Line(msgspec.Struct):
    text: str


def _read(path: Path) -> Text:
    if path.stem.startswith("."):
        raise JaxmoeError(f"{path} begins with a dot, and results are kept by name: rename the file")
    text, fingerprint = read_text(path)
    documents = (text,)
    if path.suffix.lower() in JSON_LINES:
        form = "each line is to be an object with a field `text`"
        documents = tuple(line.text for _, line in json_lines(path, text, _Line, form) if line.text)
        if not documents:
            raise JaxmoeError(f"{path} is empty: every `text` in it is")
    return Text(path.stem, path, documents, fingerprint)
