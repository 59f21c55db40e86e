"""What of a dialogue is learned: the answers, each in the form that it had when it was given."""

import json

import numpy as np
import pytest
from chat_templates import CALLS, DEEPSEEK, LLAMA3, MISTRAL, QWEN3, TALK, TEMPLATES, TOOLS

from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import Dialogue, Tokenizer, instruction_documents, speller
from jaxmoe.texts.spelling import PARAGRAPHS, Spelled, Speller, spell

TOKENS = json.dumps({"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.open(demo_checkpoint())


@pytest.fixture
def spelled(tmp_path):
    """Spell a dialogue by a template; what is learned stands between « and »."""

    def spelled(template, messages, *, prompts=False, **more):
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(TOKENS)
        with speller(tmp_path, library=False) as by:
            return [_marked(*each) for each in spell(Dialogue(messages, **more), by, prompts=prompts)]

    return spelled


def _marked(text, spans):
    parts, last = [], 0
    for start, end in spans:
        parts += [text[last:start], "«", text[start:end], "»"]
        last = end
    return "".join([*parts, text[last:]])


def test_a_template_that_adds_is_one_text(spelled):
    answers = [{key: message[key] for key in ("role", "content")} for message in TALK]
    assert spelled(MISTRAL, answers) == [
        "<s>[INST] One and one? [/INST]« Two.</s>»[INST] And two more? \u00e9\u4f60 [/INST]« Four, of course.</s>»"
    ]
    (text,) = spelled(LLAMA3, answers, variables={"date_string": "1 Jan"})
    assert "Today Date: 1 Jan" in text
    assert "<|start_header_id|>assistant<|end_header_id|>\n\n«Two.<|eot_id|>»<|start_header_id|>user" in text
    assert text.endswith("\n\n«Four, of course.<|eot_id|>»")


def test_reasoning_that_later_texts_drop_is_learned_where_it_was_given(spelled):
    first, second = spelled(QWEN3, TALK)
    assert first == (
        "<|im_start|>user\nOne and one?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nAdd <them>.\n</think>\n\nTwo.<|im_end|>\n»"
    )
    assert second == (
        "<|im_start|>user\nOne and one?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
        "<|im_start|>user\nAnd two more? \u00e9\u4f60<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\n'2' & 2\n</think>\n\nFour, of course.<|im_end|>\n»"
    )
    (whole,) = spelled(QWEN3, TALK, prompts=True)
    assert whole == f"«{second.replace('«', '').replace('»', '')}»"


def test_answers_around_a_tool_share_a_text(spelled):
    (text,) = spelled(QWEN3, CALLS, tools=TOOLS)
    assert '"description": "Adds two \u00e9 <numbers>."' in text
    assert '«<think>\na tool\n</think>\n\n\n<tool_call>\n{"name": "add", "arguments": {"b": 1, "a": 1}}' in text
    assert text.count("«") == 2
    assert text.endswith("assistant\n«<think>\n\n</think>\n\nTwo.<|im_end|>\n»")


def test_an_answer_departs_from_a_prompt_that_begins_to_think(spelled):
    (text,) = spelled(DEEPSEEK, [TALK[0], {"role": "assistant", "content": "<think>Add.</think>Two."}])
    assert text == "<s><User>One and one?<Assistant>«Two.</s>»"


def test_messages_after_the_last_answer_are_left_out(spelled):
    (text,) = spelled(MISTRAL, [*TALK[:2], {"role": "user", "content": "Thanks."}])
    assert text == "<s>[INST] One and one? [/INST]« Two.</s>»"


@pytest.mark.parametrize("marks", [False, True])
def test_marked_parts_of_a_template_that_rewrites_history(spelled, marks):
    begin, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}" + begin + "{% if loop.last %}!{% endif %}"
        "{{ m.content }}" + end + "{{ '\n' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    after = "»\n" if marks else "\n»"
    assert spelled(template, TALK) == [
        f"<user>One and one?<assistant>«!Two.{after}",
        f"<user>One and one?<assistant>Two.\n<user>And two more? \u00e9\u4f60<assistant>«!Four, of course.{after}",
    ]


def test_a_refusal_names_file_line_and_reason(tokenizer, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(MISTRAL)
    (tmp_path / "tokenizer_config.json").write_text(TOKENS)
    path = tmp_path / "talk.jsonl"
    wrong = [TALK[0], TALK[0], TALK[1]]
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in (TALK, wrong)))
    with (
        speller(tmp_path, library=False) as by,
        pytest.raises(JaxmoeError, match=r"talk\.jsonl, line 2: the chat template .*\.jinja refuses .*must alternate"),
    ):
        instruction_documents(path, tokenizer, by)


def test_each_answer_is_learned_once_whatever_the_template(tokenizer, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(TOKENS)
    for name, template in TEMPLATES.items():
        (tmp_path / "chat_template.jinja").write_text(template)
        with speller(tmp_path, library=False) as by:
            found = instruction_documents(path, tokenizer, by)
        learned = "".join(tokenizer.decode(document.ids[document.learned]) for document in found)
        assert learned.count("Two.") == learned.count("Four, of course.") == 1, name
        assert "One and one?" not in learned


def test_paragraphs_end_with_the_end_token(tokenizer, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"prompt": "One and one?", "response": "Two."}) + "\n")
    with speller(tmp_path) as by:
        assert by is PARAGRAPHS
        (document,) = instruction_documents(path, tokenizer, by)
    assert tokenizer.decode(document.ids) == "One and one?\n\nTwo.\n\n<|endoftext|>"
    assert tokenizer.decode(document.ids[document.learned]) == "Two.\n\n<|endoftext|>"


@pytest.mark.parametrize(
    ("dialogue", "said"),
    [
        (Dialogue(CALLS, TOOLS), "has tools"),
        (Dialogue(CALLS), "has reasoning, tool_calls"),
        (Dialogue(TALK), "has reasoning_content"),
        (Dialogue([{"role": "user", "content": [{"type": "image"}]}, TALK[1]]), "has image"),
        (Dialogue([{"role": "bot", "content": "a"}, TALK[1]]), "the role 'bot'"),
    ],
)
def test_paragraphs_leave_nothing_out(dialogue, said):
    with pytest.raises(JaxmoeError, match=said):
        spell(dialogue, PARAGRAPHS)


def test_parts_of_text_are_paragraphs_too():
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": " and one?"}]
    talk = Dialogue([{"role": "user", "content": parts}, {"role": "assistant", "content": "Two."}])
    assert [_marked(*each) for each in spell(talk, PARAGRAPHS)] == ["One and one?\n\n«Two.\n\n»"]


def test_what_comes_before_an_answer_has_to_stay():
    def render(dialogue, asked):
        return [Spelled(f"{count}{'?' if prompt else '!'}", None) for count, prompt in asked]

    with pytest.raises(JaxmoeError, match="it writes what comes before an answer differently"):
        spell(Dialogue(TALK[:2]), Speller("it", render))


def test_learned_tokens_touch_the_spans(tokenizer):
    document = tokenizer.document("abc \u4f60\u597d def", [(4, 6)])
    assert tokenizer.decode(document.ids[document.learned]).strip() == "\u4f60\u597d"
    assert document.ids.tolist() == tokenizer.encode("abc \u4f60\u597d def").tolist()
    assert not tokenizer.document("abc", [(1, 1)]).learned.any()
    assert np.array_equal(tokenizer.document("", []).ids, [])
