"""Instructions: dialogues in JSON lines, of which the answers are learned.

A line is an object with `messages`, a list of `{"role": ..., "content": ...}` of system, user and assistant, or with
`prompt` and `response`. Dialogues are spelled by the checkpoint's own chat template where it has one, else as plain
paragraphs. What the template writes for an assistant's turn is learned, everything else only read.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts.packing import Document
from jaxmoe.texts.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]
Spell = Callable[[Sequence[Message], bool], str]
"""Returns the text of some messages; True: up to where an answer begins."""


def read_dialogues(path: str | Path) -> list[list[Message]]:
    """Read a file of instructions.

    Args:
        path: JSON lines.

    Raises:
        JaxmoeError: lines are no JSON, lack fields, have unknown roles, empty answers or no answer; offenders are
            listed by line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise JaxmoeError(f"{path} does not exist: mend the path of the instructions")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise JaxmoeError(f"{path} is not UTF-8 at byte {error.start}: convert it") from error
    dialogues, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            dialogues.append(_dialogue(json.loads(line)))
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, JaxmoeError) else "is no JSON"
            problems.append(f"line {number} {reason}")
    if problems:
        raise JaxmoeError(f"{path}: {listing(problems, 5)}")
    if not dialogues:
        raise JaxmoeError(f"{path} is empty: give a file with instructions")
    return dialogues


def _dialogue(record: Any) -> list[Message]:
    if isinstance(record, dict) and "messages" not in record and {"prompt", "response"} <= record.keys():
        pair = zip(("user", "assistant"), (record["prompt"], record["response"]))
        record = {"messages": [{"role": role, "content": content} for role, content in pair]}
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise JaxmoeError("has neither `messages` nor `prompt` and `response`")
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise JaxmoeError(f"has a message {place} without `role` and a text as `content`")
        if message["role"] not in ROLES:
            raise JaxmoeError(f"has the role {message['role']!r}: the roles are {', '.join(ROLES)}")
        if message["role"] == "assistant" and not message["content"].strip():
            raise JaxmoeError(f"has an empty answer (message {place})")
    if messages[0]["role"] == "assistant":
        raise JaxmoeError("begins with an answer: a user's message comes first")
    if all(message["role"] != "assistant" for message in messages):
        raise JaxmoeError("has no answer: nothing could be learned from it")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def chat_template(folder: Path) -> Spell | None:
    """Return how a checkpoint spells dialogues, None if it has no chat template.

    Args:
        folder: of the checkpoint, with `chat_template.jinja` or a `tokenizer_config.json` that holds it.

    Raises:
        JaxmoeError: jinja2, which runs the template, is not installed.
    """
    source = None
    special: dict[str, Any] = {}
    if (path := folder / "tokenizer_config.json").is_file():
        config = json.loads(path.read_bytes())
        source = config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = config.get(name)
            special[name] = token.get("content") if isinstance(token, dict) else token
    if (path := folder / "chat_template.jinja").is_file():
        source = path.read_text(encoding="utf-8")
    if source is None:
        return None
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise JaxmoeError(f"{folder} has a chat template, which jinja2 runs: pip install jinja2") from None

    def refuse(message: str) -> None:
        raise JaxmoeError(f"the chat template of {folder} says: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    template = environment.from_string(source)
    tokens = {name: token for name, token in special.items() if token}
    return lambda messages, answer: template.render(messages=messages, add_generation_prompt=answer, **tokens)


def paragraphs(messages: Sequence[Message], answer: bool) -> str:
    """Spell a dialogue as its messages' texts, an empty line after each.

    Example:
        >>> paragraphs([{"role": "user", "content": "One and one?"}], True)
        'One and one?\\n\\n'
    """
    return "".join(f"{message['content']}\n\n" for message in messages)


def tokenize_dialogue(messages: Sequence[Message], tokenizer: Tokenizer, spell: Spell, *, prompts: bool) -> Document:
    """Tokenise a dialogue.

    Args:
        messages: of the dialogue, ending with an answer; later ones are ignored.
        tokenizer: of the checkpoint.
        spell: how it is written.
        prompts: whether all tokens are learned instead of those of the answers alone.

    Raises:
        JaxmoeError: the template writes earlier messages differently once later ones follow, so that it cannot be said
            which tokens are the answer's.
    """
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    parts: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    before = ""
    for place, message in enumerate(messages[: last + 1]):
        if message["role"] != "assistant":
            continue
        start, end = spell(messages[:place], True), spell(messages[: place + 1], False)
        if not (end.startswith(start) and start.startswith(before)):
            raise JaxmoeError(
                "the chat template writes a message differently when others follow: an answer cannot be told from its"
                " prompt; learn the prompts too"
            )
        for text, answer in ((start[len(before) :], False), (end[len(start) :], True)):
            ids = tokenizer.encode(text)
            parts.append(ids)
            learned.append(np.full(len(ids), answer or prompts))
        before = end
    if tokenizer.end is not None and spell is paragraphs:
        parts.append(np.array([tokenizer.end], np.int32))
        learned.append(np.ones(1, bool))
    return Document(np.concatenate(parts), np.concatenate(learned))
