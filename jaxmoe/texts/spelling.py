"""Dialogues spelled as a checkpoint's chat template spells them, with the places of what is learned.

A template that rewrites history (Qwen3's drops the reasoning of earlier answers) has no one text in which each answer
stands as the model gave it. Such a dialogue becomes several texts, each up to an answer in the form that it had when it
was given, and each answer is learned once. Where later texts only go on with earlier ones there is a single text, equal
to that of transformers' `apply_chat_template`, and what a template marks by `{% generation %}` is what is learned.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import rendering
from jaxmoe.texts.chat_template import ChatTemplate, chat_template
from jaxmoe.texts.instructions import ROLES, Dialogue, paragraphs, read_dialogues
from jaxmoe.texts.packing import Document
from jaxmoe.texts.tokenizer import Tokenizer

Span = tuple[int, int]
"""First character and the one after the last."""
Asked = tuple[int, bool]
"""How many messages to spell, and whether up to where an answer to them begins."""


class Spelled(NamedTuple):
    """A text, and which parts of it are learned; None where the template does not mark them."""

    text: str
    spans: Sequence[Span] | None


class Speller(NamedTuple):
    """How dialogues are spelled.

    Args:
        name: what it is, for messages.
        render: returns a text for each thing asked of a dialogue.
        ends: whether the tokenizer's end follows a dialogue, since its text does not hold one.
    """

    name: str
    render: Callable[[Dialogue, Sequence[Asked]], list[Spelled]]
    ends: bool = False


def instruction_documents(
    path: str | Path, tokenizer: Tokenizer, speller: Speller, *, prompts: bool = False
) -> list[Document]:
    """Tokenise a file of instructions.

    Args:
        path: JSON lines, see `read_dialogues`.
        tokenizer: of the checkpoint.
        speller: of the checkpoint.
        prompts: whether all tokens are learned instead of those of the answers alone.

    Raises:
        JaxmoeError: the file cannot be read, or the template cannot spell a dialogue; the message names file and line.
    """
    found = []
    for dialogue in read_dialogues(path):
        try:
            for text, spans in spell(dialogue, speller, prompts=prompts):
                document = tokenizer.document(text, spans or ())
                if speller.ends and tokenizer.end is not None:
                    document = Document(
                        np.append(document.ids, np.int32(tokenizer.end)), np.append(document.learned, True)
                    )
                found.append(document)
        except JaxmoeError as error:
            raise JaxmoeError(f"{path}, line {dialogue.line}: {error}") from None
    return found


def spell(dialogue: Dialogue, speller: Speller, *, prompts: bool = False) -> list[Spelled]:
    """Spell a dialogue up to its last answer.

    Args:
        dialogue: what is said.
        speller: how it is spelled.
        prompts: whether all is learned; then there is one text, and all of it is learned.

    Returns:
        One text, or several where the template rewrites history; each answer is learned in one of them.

    Raises:
        JaxmoeError: the template cannot spell the dialogue, or answers cannot be told from what comes before them.

    Example:
        >>> talk = [{"role": role, "content": text} for role, text in (("user", "Hello?"), ("assistant", "Yes."))]
        >>> (text, spans), = spell(Dialogue(talk), PARAGRAPHS)
        >>> text, [text[start:end] for start, end in spans]
        ('Hello?\\n\\nYes.\\n\\n', ['Yes.\\n\\n'])
    """
    answers = dialogue.answers()
    if prompts:
        ((text, _),) = speller.render(dialogue, [(answers[-1] + 1, False)])
        if not text:
            raise JaxmoeError(f"{speller.name} writes nothing: mend it")
        return [Spelled(text, [(0, len(text))])]
    asked = [each for place in answers for each in ((place, True), (place + 1, False))]
    parts = speller.render(dialogue, asked)
    texts: list[tuple[str, list[Span]]] = []
    for place, begun, given in zip(answers, parts[::2], parts[1::2], strict=True):
        if given.spans is None or begun.spans is None:
            spans = [_answer(dialogue, place, speller, begun.text, given.text)]
        else:
            # Those before the answer are of earlier ones, in whatever form.
            spans = list(given.spans[len(begun.spans) :])
        if not any(start < end for start, end in spans):
            raise JaxmoeError(
                f"{speller.name} writes nothing of an answer that could be learned: mend it, or learn the prompts too"
            )
        if texts and given.text.startswith(texts[-1][0]):
            spans = texts.pop()[1] + spans
        texts.append((given.text, spans))
    return [Spelled(text, spans) for text, spans in texts]


def _answer(dialogue: Dialogue, place: int, speller: Speller, begun: str, given: str) -> Span:
    """Return where an answer stands: after the prompt that the model is given, or where it departs from that.

    Args:
        dialogue: what is said.
        place: of the answer.
        speller: how it is spelled.
        begun: the text up to where the answer begins.
        given: the text up to its end.
    """
    shared = len(begun)
    if not given.startswith(begun):
        # Templates for models that think end a prompt by beginning to, and leave that out of answers without reasoning.
        shared = next((at for at, pair in enumerate(zip(begun, given)) if pair[0] != pair[1]), len(given))
        ((before, _),) = speller.render(dialogue, [(place, False)])
        if shared < len(before):
            raise JaxmoeError(
                f"{speller.name} writes what comes before an answer differently when the answer follows, so that the"
                " answer cannot be told from it: learn the prompts too"
            )
    return shared, len(given)


def _spell_paragraphs(dialogue: Dialogue, asked: Sequence[Asked]) -> list[Spelled]:
    if unknown := sorted(dialogue.roles() - set(ROLES)):
        raise JaxmoeError(f"the role {unknown[0]!r}: the roles are {', '.join(ROLES)}")
    if dialogue.tools:
        raise JaxmoeError(
            "the dialogue has tools, and the checkpoint has no chat template to spell them: copy chat_template.jinja"
            " from the model's source"
        )
    return [Spelled(paragraphs(dialogue.messages[:count]), None) for count, _ in asked]


PARAGRAPHS = Speller("paragraphs", _spell_paragraphs, ends=True)
"""Messages as paragraphs, for checkpoints without a template."""


@contextmanager
def speller(
    folder: Path,
    *,
    seconds: float = rendering.SECONDS,
    memory: int = rendering.MEMORY,
    library: bool = True,
    clock: datetime | None = None,
) -> Iterator[Speller]:
    """Give a checkpoint's speller; where it has a template, a process of its own renders it, and ends with the context.

    Args:
        folder: of the checkpoint.
        seconds: for the first text; each further one adds `rendering.SECONDS_EACH` to what is left.
        memory: bytes that rendering may take.
        library: whether transformers' own function renders where it is installed.
        clock: the time that templates are told instead of now; transformers' function does not take one.

    Raises:
        JaxmoeError: the template cannot be read, or jinja2 is not installed; by the speller: the template fails, or
            takes too long or too much memory.
    """
    template = chat_template(folder)
    if template is None:
        yield PARAGRAPHS
        return
    if find_spec("jinja2") is None:
        raise JaxmoeError(f"{template.path} is a chat template, which jinja2 renders: pip install 'jinja2>=3.1.6'")
    told = None if clock is None else clock.isoformat()
    child = _start(template, {"seconds": seconds, "memory": memory, "library": library, "clock": told})

    def render(dialogue: Dialogue, asked: Sequence[Asked]) -> list[Spelled]:
        name = template.name(dialogue.tools)
        _check_roles(dialogue, template.templates[name])
        request = {
            "template": name,
            "messages": dialogue.messages,
            "tools": dialogue.tools,
            "documents": dialogue.documents,
            "variables": dialogue.variables,
            "asked": asked,
        }
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            texts = [_answered(template, child.stdout.readline(), child) for _ in asked]
        except BrokenPipeError:
            raise _ended(template, child.wait()) from None
        if re.search(r"\{%-?\s*generation\s*-?%\}", template.templates[name]):
            return texts
        return [Spelled(text, None) for text, _ in texts]

    try:
        yield Speller(f"the chat template {template.path}", render)
    finally:
        child.kill()
        child.communicate()


def _start(template: ChatTemplate, settings: dict[str, Any]) -> "subprocess.Popen[bytes]":
    try:
        # By path, and without the path's folder before the libraries: the process loads nothing of this package. It is
        # no fork either, which threads of JAX would not survive, and no `multiprocessing`, which runs __main__ again.
        child = subprocess.Popen(
            [sys.executable, "-P", rendering.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert child.stdin is not None
        record = {"templates": template.templates, "tokens": template.tokens, **settings}
        child.stdin.write(json.dumps(record).encode() + b"\n")
        child.stdin.flush()
    except OSError as error:
        raise JaxmoeError(f"{template.path}: the process that renders it does not start: {error}") from None
    return child


def _check_roles(dialogue: Dialogue, source: str) -> None:
    """Refuse a role that neither dialogues nor this template know: most templates would leave its messages out."""
    for role in sorted(dialogue.roles() - set(ROLES)):
        if not re.search(rf"['\"]{re.escape(role)}['\"]", source):
            raise JaxmoeError(f"the role {role!r}: the roles are {', '.join(ROLES)}, and those that the template names")


def _answered(template: ChatTemplate, line: bytes, child: "subprocess.Popen[bytes]") -> Spelled:
    if not line.endswith(b"\n"):
        raise _ended(template, child.wait())
    record: dict[str, Any] = json.loads(line)
    if "text" in record:
        return Spelled(record["text"], [(start, end) for start, end in record["spans"]])
    # What a stranger's template says may be long, or steer a terminal.
    said = "".join(each if each.isprintable() else " " for each in record["error"][:300])
    if record["refused"]:
        raise JaxmoeError(f"the chat template {template.path} refuses the dialogue: {said}")
    raise JaxmoeError(f"the chat template {template.path} fails: {said}; mend it, or fetch it again")


def _ended(template: ChatTemplate, code: int) -> JaxmoeError:
    reasons = {rendering.OVERTIME: "it takes too long", rendering.OVERSIZE: "it takes too much memory"}
    reason = reasons.get(code, f"the process that renders it ended with {code}")
    return JaxmoeError(f"the chat template {template.path} fails: {reason}; mend it, or fetch it again")
