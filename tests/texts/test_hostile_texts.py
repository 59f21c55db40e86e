"""Whatever stands where texts, dialogues, templates and tokenizers are expected: one message, or it is used."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from chat_templates import DIALOGUES, TEMPLATES

from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import Speller, Tokenizer, read_dialogues, read_texts, rendering, spell
from jaxmoe.texts.chat_template import chat_template
from jaxmoe.texts.spelling import PARAGRAPHS, Spelled

VALUES = [
    None,
    True,
    0,
    -1,
    2**70,
    1e999,
    float("nan"),
    "",
    " ",
    "a",
    "\ud800",
    "\0",
    "assistant",
    [],
    [[]],
    {},
    {"": 0},
]
VALUES += [["a"], {"role": "user", "content": "a"}, {"type": "text"}, {"type": "text", "text": 3}, "x" * 5000]
FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")


def damaged(value, draw):
    """A copy of a JSON value with another one, or none, somewhere in it."""
    if draw.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return draw.choice(VALUES)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        rest = [] if draw.random() < 0.2 else [damaged(value[place], draw)]
        return [*value[:place], *rest, *value[place + 1 :]]
    key = draw.choice(list(value))
    rest = {} if draw.random() < 0.2 else {draw.choice([key, key, key, "\udfff", "content"]): damaged(value[key], draw)}
    return {**{name: kept for name, kept in value.items() if name != key}, **rest}


def scrambled(content: bytes, draw) -> bytes:
    """Bytes with some of them changed, cut off or in another encoding."""
    kind = draw.randrange(6)
    if kind == 0:
        return content.decode().encode(draw.choice(["utf-16", "utf-8-sig", "utf-32"]))
    at, length = draw.randrange(len(content) + 1), draw.randrange(4)
    middle = [b"", bytes(draw.randrange(256) for _ in range(4)), b"\0", b"\r\n", b"[" * 3000, b"\\ud800"][kind]
    return content[:at] + middle + content[at + length :]


def in_process(template) -> Speller:
    """A speller without a process of its own, which these inputs do not need."""
    renderer = rendering.own_renderer()

    def render(dialogue, asked):
        request = dialogue._asdict() | {"template": "it"}
        found = []
        for count, prompt in asked:
            said = rendering.rendered(renderer, {"templates": {"it": template}, "tokens": {}}, request, count, prompt)
            if "error" in said:
                raise JaxmoeError(said["error"])
            found.append(Spelled(said["text"], said["spans"] if "generation" in template else None))
        return found

    return Speller("it", render)


def outcome(function, *arguments):
    try:
        function(*arguments)
    except JaxmoeError:
        return "refused"
    return "used"


def spell_all(path: Path, spellers, tokenizer) -> None:
    for dialogue in read_dialogues(path):
        for by in spellers:
            for prompts in (False, True):
                for text, spans in spell(dialogue, by, prompts=prompts):
                    tokenizer.document(text, spans or ())


def test_dialogues(tmp_path):
    tokenizer, spellers = Tokenizer.open(demo_checkpoint()), [PARAGRAPHS, *map(in_process, TEMPLATES.values())]
    draw, path, seen = random.Random(0), tmp_path / "talk.jsonl", set()
    lines = [
        {**{k: v for k, v in each.items() if k != "variables"}, "prompt": "a", "response": "b"}
        for each in DIALOGUES.values()
    ]
    for _ in range(400):
        content = json.dumps(damaged(draw.choice(lines), draw)).encode()
        path.write_bytes(scrambled(content, draw) if draw.random() < 0.3 else content)
        by = draw.choice(spellers)
        seen.add(outcome(spell_all, path, [by], tokenizer))
    assert seen == {"used", "refused"}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_texts(tmp_path, suffix):
    draw, path, seen = random.Random(1), tmp_path / f"a{suffix}", set()
    plain = json.dumps({"text": "some \u4f60 text", "more": [1]}, ensure_ascii=False).encode() + b"\n"
    for _ in range(150):
        content = plain * 2
        if suffix == ".jsonl" and draw.random() < 0.5:
            content += json.dumps(damaged({"text": "b", "c": 0}, draw)).encode()
        path.write_bytes(scrambled(content, draw) if draw.random() < 0.7 else content)
        seen.add(outcome(read_texts, [path]))
    assert seen == {"used", "refused"}


def test_tokenizer_configs(tmp_path):
    token = {"content": "<s>", "lstrip": False, "special": True}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config = {"bos_token": "<s>", "eos_token": token, "chat_template": named, "added_tokens_decoder": {"3": token}}
    draw, seen = random.Random(2), set()
    for _ in range(300):
        for name in FILES:
            content = json.dumps(damaged(config, draw)).encode()
            (tmp_path / name).write_bytes(scrambled(content, draw) if draw.random() < 0.2 else content)
        seen.add(outcome(chat_template, tmp_path))
    assert seen == {"used", "refused"}


def test_tokenizers(tmp_path):
    program = Path(__file__).with_name("hostile_tokenizers.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path, "0", "250"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert outcomes["used"] > 20
    assert outcomes["used"] + outcomes["refused"] == 250
