"""A thousand hostile inputs from a seed: each is read, or refused with one `JaxmoeError`, in bounded time and memory.

A case that fails is named by its kind and number; `case(folder, kind, number)` runs it alone.
"""

import random
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from hostile.inputs import KINDS, SLOW, build, spoil

from jaxmoe.errors import JaxmoeError

SEED = 20261130
SECONDS = 20
MEMORY = 6 << 30
"""Bytes of address space that a case may add."""

CASES, SAMPLE = 60, 4
"""Cases of a kind: in all, and in the usual tests."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "valid"
    folder.mkdir()
    build(folder)
    return folder


class TooLong(BaseException):
    """A case did not end. No `Exception`: nothing may catch it on its way."""


@contextmanager
def limits():
    """Bound the time and the memory of what runs within."""

    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (int(used.split()[1]) * 1024 + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def case(valid: Path, name: str, number: int) -> str | None:
    """Run one case on a copy of what it changes; return what went wrong, None if nothing did."""
    kind, choose = KINDS[name], random.Random(f"{SEED} {name} {number}").randrange
    folder = valid.with_name("case")
    shutil.copytree(valid, folder, symlinks=True)
    try:
        if kind.file:
            path = folder / kind.file
            spoil(path, path.read_bytes(), kind, choose)
        with limits():
            kind.read(folder, choose)
    except JaxmoeError as error:
        message = str(error)
        return None if message.strip() and "Traceback" not in message else f"said {message!r}"
    except (Exception, TooLong) as error:
        return f"{type(error).__name__}: {error}"[:600]
    finally:
        shutil.rmtree(folder)
    return None


def failures(valid: Path, name: str, numbers: range) -> list[str]:
    found = ((number, case(valid, name, number)) for number in numbers)
    return [f"{name} {number}: {error}" for number, error in found if error is not None]


def fewer(name: str, count: int) -> int:
    return max(1, count // SLOW.get(name, 1))


@pytest.mark.parametrize("name", KINDS)
def test_valid_inputs_are_read(inputs, name):
    kind, choose = KINDS[name], random.Random(0).randrange
    if name == "flags":
        return
    folder = inputs.with_name("case")
    shutil.copytree(inputs, folder)
    try:
        kind.read(folder, choose)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_sample_of_hostile_inputs(inputs, name):
    assert not failures(inputs, name, range(fewer(name, SAMPLE)))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_hostile_inputs(inputs, name):
    assert not failures(inputs, name, range(fewer(name, CASES)))
