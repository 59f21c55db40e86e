"""Reading texts: files, folders and JSON lines, and what bad ones are told."""

import gzip
import hashlib
import json
import os

import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import read_texts


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_files_folders_and_json_lines(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "b.txt", "second")
    write(folder / "a.txt", "first\r\nline")
    write(folder / "ignored.md", "no")
    lines = [{"text": "one\u2028still one"}, {"text": ""}, {"text": "two", "id": 3}]
    path = write(tmp_path / "web.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    single = write(tmp_path / "single.md", b"\xef\xbb\xbfplain")
    texts = read_texts([folder, str(path), single])
    assert [text.name for text in texts] == ["a", "b", "web", "single"]
    assert [text.documents for text in texts] == [
        ("first\nline",),
        ("second",),
        ("one\u2028still one", "two"),
        ("plain",),
    ]
    assert texts[2].fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.txt", " \n\t\n", "is empty"),
        ("nul.txt", b"some\0thing", "binary"),
        ("late_nul.txt", b"a" * 100_000 + b"\0", "binary"),
        ("latin.txt", "abc\n\u00e9".encode("latin-1"), "not UTF-8 at byte 4 (line 2)"),
        ("surrogate.txt", b"abc \xed\xa0\x80", "not UTF-8 at byte 4 (line 1)"),
        ("windows.txt", "plain text".encode("utf-16"), "is UTF-16: give text in UTF-8"),
        ("zipped.txt", gzip.compress(b"plain text", mtime=0), "is compressed by gzip"),
        ("table.jsonl", b"PAR1\x15\x04\xff", "is a Parquet table"),
        ("no_json.jsonl", '{"text": "a"}\nplain\n', "line 2: no JSON"),
        (
            "no_text.jsonl",
            '{"text": "a"}\n\n{"body": "b"}\n{"text": 3}',
            "required field `text`; line 4: Expected `str`",
        ),
        ("no_object.jsonl", '["text"]\n', "line 1: Expected `object`, got `array`"),
        ("null.jsonl", "null\n", "line 1: Expected `object`, got `null`"),
        ("half.jsonl", '{"text": "a"}\r\n{"text": "\\ud800b"}\r\n', "line 2: half a surrogate pair"),
        ("deep.jsonl", '{"text": ' + "[" * 100_000, "line 1: nested too deep"),
        ("huge.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1: no JSON"),
        ("all_empty.jsonl", '{"text": ""}\n', "is empty"),
        (".hidden", "text", "begins with a dot"),
    ],
)
def test_bad_files(tmp_path, name, content, said):
    path = write(tmp_path / name, content)
    with pytest.raises(JaxmoeError) as raised:
        read_texts([path])
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def test_all_offenders_are_listed(tmp_path):
    (tmp_path / "bare").mkdir()
    paths = [tmp_path / "missing.txt", tmp_path / "bare", write(tmp_path / "empty.txt", "")]
    with pytest.raises(JaxmoeError, match=r"bare has no \*\.txt.*|missing\.txt does not exist") as raised:
        read_texts(paths)
    assert all(str(path) in str(raised.value) for path in paths)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    folder = tmp_path / "folder"
    (folder / "folder.txt").mkdir(parents=True)
    os.mkfifo(folder / "pipe.txt")
    (folder / "link.txt").symlink_to("nowhere")
    (folder / "loop.txt").symlink_to("loop.txt")
    paths = [folder, "/dev/null", tmp_path / ("x" * 300), "nul\0", tmp_path / "half\ud800", "~nobody/text.txt"]
    with pytest.raises(JaxmoeError) as raised:
        read_texts(paths)
    for said in ("pipe.txt is not a regular file but a pipe", "folder.txt is not a regular file but a folder"):
        assert said in str(raised.value)
    for place in (
        "link.txt does not exist",
        "loop.txt cannot be read",
        "/dev/null is not",
        "xxx cannot be read",
        "nul",
    ):
        assert place in str(raised.value)


def test_two_domains_of_one_name(tmp_path):
    (tmp_path / "other").mkdir()
    paths = [write(tmp_path / "code.txt", "a"), write(tmp_path / "other" / "code.jsonl", '{"text": "b"}')]
    with pytest.raises(JaxmoeError, match=r"code\.txt.*code\.jsonl are all called 'code'"):
        read_texts(paths)


def test_no_texts_at_all():
    with pytest.raises(JaxmoeError, match="at least one"):
        read_texts([])
