"""Whatever reaches the top of the command line becomes one message, and never a traceback unless asked for."""

import errno
import json
import os
import shutil
import subprocess

import pytest
from program import ENVIRONMENT, call, command

from jaxmoe.checkpoint import inspection
from jaxmoe.data import demo_checkpoint


class JaxRuntimeError(RuntimeError):
    """Named like JAX's, which the command line knows by name alone."""


def nested(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


ERRORS = {
    "a defect": (IndexError("list index out of range"), ["IndexError: list index", "defect of jaxmoe", "--debug"]),
    "no text": (KeyError(), ["KeyError", "defect of jaxmoe"]),
    "endless recursion": (RecursionError("maximum recursion depth exceeded"), ["RecursionError", "defect of jaxmoe"]),
    "several lines": (RuntimeError("first\nsecond"), ["RuntimeError: first", "defect of jaxmoe"]),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "/data/x"), ["/data/x: No space", "free some"]),
    "too many files": (OSError(errno.EMFILE, "Too many open files", "a"), ["a: Too many", "ulimit -n"]),
    "broken disk": (OSError(errno.EIO, "Input/output error", "b"), ["b: Input/output error", "disk"]),
    "stale handle": (OSError(errno.ESTALE, "Stale file handle"), ["Stale file handle", "run the same command again"]),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "c"), ["c: Permission denied", "chmod"]),
    "two files": (OSError(errno.EROFS, "Read-only file system", "d", None, "e"), ["d and e: Read-only"]),
    "other system error": (OSError(errno.EPIPE + 1000, "odd", "f"), ["f: odd", "defect of jaxmoe"]),
    "memory": (MemoryError(), ["MemoryError", "not enough memory"]),
    "device memory": (
        JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        ["RESOURCE_EXHAUSTED", "not enough memory"],
    ),
    "other XLA error": (JaxRuntimeError("INTERNAL: odd"), ["INTERNAL: odd", "defect of jaxmoe"]),
    "what it followed from": (
        nested(RuntimeError("saving failed"), OSError(errno.ENOSPC, "No space left on device", "g")),
        ["g: No space left"],
    ),
}


def run(monkeypatch, error: BaseException, *arguments: str):
    def fail(source, revision=None):
        raise error

    monkeypatch.setattr(inspection, "inspect", fail)
    return call(*arguments, "inspect", "somewhere", "--json")


@pytest.mark.parametrize("name", ERRORS)
def test_one_message(monkeypatch, name):
    error, said = ERRORS[name]
    result = run(monkeypatch, error)
    assert result.returncode == 1
    message = json.loads(result.stdout)["error"]
    assert result.stderr == f"error: {message}\n"
    assert all(text in message for text in said), message
    assert "Traceback" not in message


def test_debug_shows_where_it_arose(monkeypatch):
    result = run(monkeypatch, IndexError("list index out of range"), "--debug")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_a_defect_names_its_line(monkeypatch):
    monkeypatch.setattr(inspection.files, "read_config", lambda folder: [][1])
    result = call("inspect", demo_checkpoint())
    assert "(jaxmoe/checkpoint/inspection.py, line " in result.stderr


def test_stopping_is_no_error(monkeypatch):
    result = run(monkeypatch, KeyboardInterrupt())
    assert result.returncode == 130
    assert result.stderr == "stopped\n"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_goes_away(options):
    """As `jaxmoe inspect | head -1`, with a reader that reads nothing at all."""
    read, write = os.pipe()
    os.close(read)
    arguments = command("inspect", demo_checkpoint(), *options)
    done = subprocess.run(arguments, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, check=False, timeout=100)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_standard_output():
    with open("/dev/full", "wb") as full:
        arguments = command("inspect", demo_checkpoint(), "--json")
        done = subprocess.run(arguments, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, check=False, timeout=100)
    assert done.returncode == 1
    assert done.stderr.count(b"error: ") == 1
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_name_that_is_no_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    shutil.copytree(os.fsencode(demo_checkpoint()), folder)
    done = subprocess.run([*command("inspect"), folder], env=ENVIRONMENT, capture_output=True, check=False, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\udcff" in done.stdout


def test_a_closed_standard_output():
    script = 'exec "$@" >&-'
    arguments = ["sh", "-c", script, "sh", *command("inspect", demo_checkpoint())]
    done = subprocess.run(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, check=False, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"")
