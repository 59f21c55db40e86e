"""Chat templates: found where transformers finds them, rendered as it does, and held to time and memory."""

import json
import os
import subprocess
import sys
import time

import pytest
from chat_templates import DIALOGUES, GENERATION, MISTRAL, TEMPLATES, TOOLS

from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import Dialogue, Tokenizer, instruction_documents, rendering, spell, speller
from jaxmoe.texts.chat_template import chat_template

TOKENS = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>"}, "pad_token": None}
ANSWER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def folder_with(path, template=None, **config):
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", **TOKENS, **config})
    )
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' tokenizer of the demo with the special tokens of these tests."""
    transformers = pytest.importorskip("transformers")
    path = folder_with(tmp_path_factory.mktemp("tokenizer"))
    (path / "tokenizer.json").write_bytes((demo_checkpoint() / "tokenizer.json").read_bytes())
    return transformers.AutoTokenizer.from_pretrained(path)


def applied(theirs, template, messages, dialogue, prompt, **options):
    """What transformers gives, or None where the template refuses."""
    from jinja2.exceptions import TemplateError

    try:
        return theirs.apply_chat_template(
            messages,
            tools=dialogue.get("tools"),
            documents=dialogue.get("documents"),
            chat_template=template,
            add_generation_prompt=prompt,
            **{"tokenize": False, **options},
            **dialogue.get("variables", {}),
        )
    except (TemplateError, TypeError):
        return None


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", DIALOGUES)
def test_texts_are_those_of_transformers(theirs, tmp_path, name, kind):
    dialogue, source = DIALOGUES[kind], TEMPLATES[name]
    tokens = chat_template(folder_with(tmp_path, source)).tokens
    assert tokens == theirs.special_tokens_map
    request = {"template": "it", "tools": None, "documents": None, "variables": {}, **dialogue}
    settings = {"templates": {"it": source}, "tokens": tokens}
    for count in range(1, len(dialogue["messages"]) + 1):
        for prompt in (False, True):
            ours = rendering.rendered(rendering.own_renderer(), settings, request, count, prompt)
            expected = applied(theirs, source, dialogue["messages"][:count], dialogue, prompt)
            assert ours.get("text") == expected


@pytest.mark.parametrize("library", [False, True])
def test_tokens_and_what_is_learned_are_those_of_transformers(theirs, tmp_path, library):
    (tmp_path / "talk.jsonl").write_text(
        "".join(json.dumps({"messages": DIALOGUES[kind]["messages"]}) + "\n" for kind in ("talk", "system", "parts"))
    )
    tokenizer = Tokenizer.open(demo_checkpoint())
    with speller(folder_with(tmp_path, GENERATION), library=library) as spelled:
        found = instruction_documents(tmp_path / "talk.jsonl", tokenizer, spelled)
    for document, kind in zip(found, ("talk", "system", "parts"), strict=True):
        expected = applied(
            theirs,
            GENERATION,
            DIALOGUES[kind]["messages"],
            {},
            False,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert document.ids.tolist() == expected["input_ids"]
        assert document.learned.astype(int).tolist() == expected["assistant_masks"]
        assert 0 < document.learned.sum() < len(document.ids)


FILES = {
    "config": ({"tokenizer_config.json": "config"}, "config", "config"),
    "file over config": ({"tokenizer_config.json": "config", "chat_template.jinja": "file"}, "file", "file"),
    "named": ({"tokenizer_config.json": {"default": "one", "tool_use": "two"}}, "one", "two"),
    "folder over config": (
        {
            "tokenizer_config.json": {"tool_use": "config"},
            "chat_template.jinja": "file",
            "additional_chat_templates/tool_use.jinja": "folder",
        },
        "file",
        "folder",
    ),
    "folder alone": ({"tokenizer_config.json": "config", "additional_chat_templates/tool_use.jinja": "b"}, None, "b"),
    "file of a processor": ({"tokenizer_config.json": None, "chat_template.json": "processor"}, "processor", None),
}


@pytest.mark.parametrize("case", FILES)
def test_templates_are_found_where_transformers_finds_them(theirs, tmp_path, case):
    files, plain, tools = FILES[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            if isinstance(content, dict):
                content = [{"name": key, "template": value} for key, value in content.items()]
            content = json.dumps({"tokenizer_class": "TokenizersBackend", "chat_template": content})
        (tmp_path / name).write_text(content)
    found = chat_template(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((demo_checkpoint() / "tokenizer.json").read_bytes())
    other = type(theirs).from_pretrained(tmp_path)
    for expected, given in ((plain, None), (tools, TOOLS)):
        if expected is None and case == "folder alone":
            with pytest.raises(JaxmoeError, match=r"additional_chat_templates has the chat templates tool_use"):
                found.name(given)
        elif expected is not None:
            assert found.templates[found.name(given)] == expected
            if "chat_template.json" not in files:
                assert other.get_chat_template(tools=given) == expected


def test_older_files_hold_special_tokens(theirs, tmp_path):
    folder_with(tmp_path, "x")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<|pad|>"}, "more": []}))
    assert chat_template(tmp_path).tokens == {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"chat_template": 5}, r"got `int` - at `\$.chat_template`"),
        ({"chat_template": [{"name": "default"}]}, r"missing required field `template` - at `\$.chat_template\[0\]`"),
        ({"chat_template": {"default": 3}}, "Expected `str`, got `int`"),
        ({"eos_token": 3}, r"at `\$.eos_token`"),
        ({"eos_token": ["</s>"]}, r"at `\$.eos_token`"),
        ({"added_tokens_decoder": []}, r"at `\$.added_tokens_decoder`"),
    ],
)
def test_a_tokenizer_config_of_other_types(tmp_path, config, said):
    with pytest.raises(JaxmoeError, match=r"tokenizer_config\.json does not hold what it should.*" + said):
        chat_template(folder_with(tmp_path, **config))


@pytest.mark.parametrize("content", [b"", b"[" * 5000, b"\xff{}", b"null"])
def test_a_tokenizer_config_that_is_none(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(JaxmoeError, match=r"tokenizer_config\.json"):
        chat_template(tmp_path)


def test_template_files_that_are_none(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(JaxmoeError, match=r"chat_template\.jinja is not UTF-8 at byte 2"):
        chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(JaxmoeError, match="not a regular file but a pipe"):
        chat_template(tmp_path)


HOSTILE = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% import 'os' as os %}": "no loader",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ cycler.__init__.__globals__.os }}": "SecurityError",
    "{{ namespace(__class__=1) }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}": "RecursionError",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000: "RecursionError",
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30: "nested",
    "{% for %}": "TemplateSyntaxError",
    "{{ a.b.c }}": "'a' is undefined",
    "{{ strftime_now(5) }}": "TypeError",
    "{{ raise_exception('no\x1b[31m' * 300) }}": r"refuses the dialogue: no \[31m",
    "{{ 'a' * 10 ** 11 }}": "too much memory",
    "{{ '%09999999999d' % 3 }}": "too much memory|OverflowError|ValueError",
    "{{ 'a' * 2 ** 25 }}": "writes 33554432 characters",
    "{{ 5 }}": "writes nothing of an answer",
    "": "writes nothing of an answer",
    "{{ messages | length }}": "writes what comes before an answer differently",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_is_one_message(tmp_path, source):
    with (
        speller(folder_with(tmp_path, source), library=False) as spelled,
        pytest.raises(JaxmoeError, match=HOSTILE[source]) as caught,
    ):
        spell(Dialogue(ANSWER), spelled)
    assert str(tmp_path / "chat_template.jinja") in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_template_that_never_ends(tmp_path):
    loop = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    begun = time.monotonic()
    with (
        speller(folder_with(tmp_path, loop), library=False, seconds=0.5) as spelled,
        pytest.raises(JaxmoeError, match=r"chat_template\.jinja fails: it takes too long"),
    ):
        spell(Dialogue(ANSWER), spelled)
    assert time.monotonic() - begun < 20


def test_a_template_that_fills_the_memory_slowly(tmp_path):
    grow = "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
    with (
        speller(folder_with(tmp_path, grow), library=False, memory=1 << 26) as spelled,
        pytest.raises(JaxmoeError, match="it takes too much memory"),
    ):
        spell(Dialogue(ANSWER), spelled)


def test_memory_is_watched_where_the_system_does_not_limit_it():
    program = (
        f"import runpy, sys, time; it = runpy.run_path({rendering.__file__!r}); limit = it['limit_memory'];"
        "limit.__globals__['SIZES'] = '/none'; limit(1 << 26); held = b'1' * (1 << 28); time.sleep(20)"
    )
    # Through a shell: on Linux, what a process starts itself inherits its peak.
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, program]
    assert subprocess.run(command, timeout=60).returncode == rendering.OVERSIZE


def test_a_process_that_dies_is_one_message(tmp_path, monkeypatch):
    program = tmp_path / "dies.py"
    program.write_text("import os; input(); input(); os._exit(7)")
    monkeypatch.setattr(rendering, "__file__", str(program))
    with (
        speller(folder_with(tmp_path, MISTRAL)) as spelled,
        pytest.raises(JaxmoeError, match="ended with 7"),
    ):
        spell(Dialogue(ANSWER), spelled)


def test_the_process_loads_neither_jax_nor_the_package():
    code = f"import runpy, sys; runpy.run_path({rendering.__file__!r}); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"jax", "numpy", "jaxmoe", "torch"} & set(loaded)


def test_a_role_that_nobody_knows(tmp_path):
    talk = [
        {"role": "user", "content": "a"},
        {"role": "bot", "content": "b"},
        {"role": "assistant", "content": "b"},
    ]
    with (
        speller(folder_with(tmp_path, MISTRAL), library=False) as spelled,
        pytest.raises(JaxmoeError, match="the role 'bot': the roles are system"),
    ):
        spell(Dialogue(talk), spelled)
    source = "{% for m in messages %}{% if m.role == 'bot' %}?{% endif %}{{ m.content }}{% endfor %}"
    with speller(folder_with(tmp_path, source), library=False) as spelled:
        assert [text for text, _ in spell(Dialogue(talk), spelled)] == ["a?bb"]
