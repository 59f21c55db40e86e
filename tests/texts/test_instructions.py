"""Dialogues: what is learned are the answers as the checkpoint's template writes them, and bad files say which line."""

import json

import numpy as np
import pytest

from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import Tokenizer, chat_template, paragraphs, read_dialogues, tokenize_dialogue

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Four, of course."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.open(demo_checkpoint())


def folder_with(path, template):
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "eos_token": {"content": "|"}}), encoding="utf-8"
    )
    return path


def test_answers_of_a_template_are_learned(tokenizer, tmp_path):
    spell = chat_template(folder_with(tmp_path, TEMPLATE))
    document = tokenize_dialogue(TALK, tokenizer, spell, prompts=False)
    assert tokenizer.decode(document.ids) == spell(TALK, False)
    learned = [tokenizer.decode(part) for part in np.split(document.ids, _changes(document.learned))]
    assert learned[1::2] == ["Two.|", "Four, of course.|"]
    assert learned[0] == "<system>Be brief.|<user>One and one?|<assistant>"
    assert tokenize_dialogue(TALK, tokenizer, spell, prompts=True).learned.all()


def _changes(learned):
    return np.flatnonzero(np.diff(learned)) + 1


def test_a_template_file_goes_before_the_one_in_the_config(tokenizer, tmp_path):
    (folder_with(tmp_path, "old") / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert chat_template(tmp_path)(TALK[:2], True).endswith("<assistant>")


def test_without_a_template_messages_are_paragraphs(tokenizer, tmp_path):
    assert chat_template(tmp_path) is None
    document = tokenize_dialogue(TALK, tokenizer, paragraphs, prompts=False)
    learned = [tokenizer.decode(part) for part in np.split(document.ids, _changes(document.learned))]
    assert learned[1] == "Two.\n\n"


def test_a_template_that_looks_ahead_is_refused(tokenizer, tmp_path):
    spell = chat_template(folder_with(tmp_path, "{{ messages | length }}" + TEMPLATE))
    with pytest.raises(JaxmoeError, match="writes a message differently"):
        tokenize_dialogue(TALK, tokenizer, spell, prompts=False)


def test_a_template_runs_in_a_sandbox(tmp_path):
    from jinja2.exceptions import SecurityError

    spell = chat_template(folder_with(tmp_path, "{{ ''.__class__.__mro__ }}"))
    with pytest.raises(SecurityError):
        spell(TALK, False)


def test_both_forms_of_a_line_are_read(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n\n" + json.dumps({"prompt": "a", "response": "b"}) + "\n")
    first, second = read_dialogues(path)
    assert first == TALK
    assert second == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ('["a"]', "line 2 has neither"),
        ('{"prompt": "a"}', "line 2 has neither"),
        ('{"messages": []}', "line 2 has neither"),
        ('{"messages": [{"role": "user"}]}', "message 1 without"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "role 'bot': the roles are system, user, assistant"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "begins with an answer"),
        ('{"prompt": "a", "response": " "}', "empty answer"),
        ('{"prompt": "a", "response": 3}', "message 2 without"),
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
