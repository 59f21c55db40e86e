"""Records are read from regular files alone, and checked against their type."""

import os
import socket
from dataclasses import dataclass

import pytest

from jaxmoe.checkpoint.records import open_regular, read_bytes, read_record
from jaxmoe.errors import JaxmoeError


@dataclass(frozen=True)
class Layer:
    name: str
    ranks: list[int]


def test_reads_what_the_type_says(tmp_path):
    path = tmp_path / "layer.json"
    path.write_text('{"name": "gate", "ranks": [3, 4]}')
    assert read_record(path, Layer, "write it again") == Layer("gate", [3, 4])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"name": "gate", "ranks": [3, "4"]}', r"ranks\[1\]"),
        (b'{"name": "gate"}', "ranks"),
        (b"[]", "does not hold what it should"),
        (b"null", "does not hold what it should"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"name": "\xff", "ranks": []}', "is not JSON"),
        (b"[" * 100_000, "is not JSON|does not hold"),
        (b'{"\\ud800": 1, "ranks": []}', "is half a character"),
    ],
)
def test_names_what_does_not_fit(tmp_path, content, said):
    path = tmp_path / "layer.json"
    path.write_bytes(content)
    with pytest.raises(JaxmoeError, match=said) as caught:
        read_record(path, Layer, "write it again")
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("write it again")


def test_waits_for_nothing_that_is_not_a_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
        server.bind("socket")
        for name in ("pipe", "folder", "socket"):
            with pytest.raises(JaxmoeError, match="not a regular file"):
                open_regular(tmp_path / name)
    with pytest.raises(JaxmoeError, match="device"):
        read_bytes("/dev/zero")
    with pytest.raises(JaxmoeError, match="does not exist"):
        read_bytes(tmp_path / "absent")
    with pytest.raises(JaxmoeError, match="cannot be read"):
        read_bytes("a\0b")


def test_refuses_what_is_too_large_to_be_one(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(JaxmoeError, match="something else"):
        read_bytes(path)


def test_json_as_python_writes_it_is_read(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"3": [Infinity, -1e400], "4": [NaN]}')
    found = read_record(path, dict[int, list[float]], "write it again")
    assert found[3] == [float("inf"), float("-inf")]
    assert found[4][0] != found[4][0]
