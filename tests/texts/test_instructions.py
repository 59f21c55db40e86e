"""Dialogues in files: all that templates take is kept, and bad lines are named."""

import json

import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import read_dialogues

TALK = [{"role": "user", "content": "One and one?"}, {"role": "assistant", "content": "Two."}]


def test_both_forms_of_a_line_are_read(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n\n" + json.dumps({"prompt": "a", "response": "b"}) + "\r\n")
    first, second = read_dialogues(path)
    assert (first.messages, first.line) == (TALK, 1)
    assert second.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert (second.tools, second.documents, second.variables, second.line) == (None, None, {}, 3)


def test_all_that_a_template_takes_is_kept(tmp_path):
    path = tmp_path / "talk.jsonl"
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": 2**70}}}],
    }
    talk = [TALK[0], call, {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "2"}]}, TALK[1]]
    tools = [{"type": "function", "function": {"name": "f"}}]
    more = {"documents": [{"title": "a"}], "chat_template_kwargs": {"enable_thinking": False}, "score": float("nan")}
    lines = [{"messages": talk, "tools": tools, **more}, {"messages": talk, "tools": json.dumps(tools), "prompt": 3}]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, lines)).encode())
    first, second = read_dialogues(path)
    assert first.messages == second.messages == talk
    assert first.tools == second.tools == tools
    assert (first.documents, first.variables) == ([{"title": "a"}], {"enable_thinking": False})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ('["a"]', "line 2: Expected `object`, got `array`"),
        ("[" * 100_000, "line 2: nested too deep"),
        ('{"messages": ' + "[" * 900 + "]" * 900 + "}", r"line 2: Expected `object`, got `array`"),
        ('{"messages": {}}', "line 2: Expected `array"),
        ('{"prompt": "a"}', "line 2: neither `messages` nor"),
        ('{"prompt": ["a"], "response": "b"}', "line 2: neither `messages` nor"),
        ('{"messages": []}', "line 2: neither `messages` nor"),
        ('{"messages": [{"content": "a"}]}', "message 1 has no `role`"),
        ('{"messages": [{"role": 3, "content": "a"}]}', "message 1 has no `role`"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no `content`"),
        ('{"messages": [{"role": "user", "content": 3}]}', "message 1 has a `content` that is neither"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "message 1 has parts of content that are no objects"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "an answer comes first"),
        ('{"prompt": "a", "response": " "}', "message 2 is an empty answer"),
        ('{"prompt": "a", "response": 3}', "neither"),
        ('{"prompt": "a\\ud800", "response": "b"}', r"line 2: half a surrogate pair"),
        ('{"prompt": "a", "response": "b", "tools": "["}', "`tools` are no list of objects"),
        ('{"prompt": "a", "response": "b", "tools": ["a"]}', "`tools` are no list of objects"),
        ('{"prompt": "a", "response": "b", "documents": "a"}', r"Expected `array \| null`, got `str`"),
        ('{"prompt": "a", "response": "b", "chat_template_kwargs": [1]}', r"Expected `object \| null`"),
        ('{"prompt": "a", "response": "b", "tools": [{"a": "\\udfff"}]}', r"half a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "talk.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line)
    with pytest.raises(JaxmoeError, match=message) as caught:
        read_dialogues(path)
    assert str(path) in str(caught.value)


def test_files_that_hold_nothing(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(JaxmoeError, match="is empty"):
        read_dialogues(tmp_path / "empty.jsonl")
    with pytest.raises(JaxmoeError, match="does not exist"):
        read_dialogues(tmp_path / "none.jsonl")
