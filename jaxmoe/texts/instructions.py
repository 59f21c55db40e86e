"""Instructions: dialogues in JSON lines, of which the answers are learned.

A line is an object with `messages`, a list of `{"role": ..., "content": ...}` as chat templates take them, also with
`tool_calls`, `reasoning_content` and content in parts, or with `prompt` and `response`. `tools`, `documents` and
`chat_template_kwargs` beside it go to the template too.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from jaxmoe.errors import JaxmoeError
from jaxmoe.texts.reading import at_home
from jaxmoe.texts.text_files import json_lines, read_text

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
"""Who speaks in published dialogues; a template may know others."""
Message = Mapping[str, Any]


class Dialogue(NamedTuple):
    """A dialogue.

    Args:
        messages: each with a `role`; other keys are the template's.
        tools: JSON schemas of what the model may call.
        documents: what the model may read.
        variables: further values that the template can name, such as `enable_thinking`.
        line: of the file.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = {}
    line: int = 0

    def answers(self) -> list[int]:
        """Return the places of the answers among the messages."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]

    def roles(self) -> set[str]:
        """Return who speaks."""
        return {message["role"] for message in self.messages}


class _Line(msgspec.Struct):
    messages: list[dict[str, Any]] | None = None
    tools: Any = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Of any type, since it is another column's name where there are messages.
    prompt: Any = None
    response: Any = None

    def __post_init__(self):
        if self.messages is None and isinstance(self.prompt, str) and isinstance(self.response, str):
            pair = (("user", self.prompt), ("assistant", self.response))
            self.messages = [{"role": role, "content": content} for role, content in pair]
        self.prompt = self.response = None
        if not self.messages:
            raise ValueError("neither `messages` nor the texts `prompt` and `response`")
        for place, message in enumerate(self.messages, start=1):
            _check_message(place, message)
        if self.messages[0]["role"] == "assistant":
            raise ValueError("an answer comes first: give what it answers")
        if all(message["role"] != "assistant" for message in self.messages):
            raise ValueError("no answer: nothing could be learned from it")
        try:
            # Tables hold one type in a column, so that schemas also come as JSON in JSON.
            tools = json.loads(self.tools) if isinstance(self.tools, str) else self.tools
            self.tools = msgspec.convert(tools, list[dict[str, Any]] | None)
        except ValueError as error:
            raise ValueError(f"`tools` are no list of objects ({error})") from None


def _check_message(place: int, message: Message) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ValueError(f"message {place} has no `role`")
    if isinstance(content, list):
        if not all(isinstance(part, dict) for part in content):
            raise ValueError(f"message {place} has parts of content that are no objects")
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"message {place} has a `content` that is neither text nor a list of parts")
    if role == "assistant":
        said = content.strip() if isinstance(content, str) else content
        if not said and not any(message.get(key) for key in ("tool_calls", "reasoning_content", "reasoning")):
            raise ValueError(f"message {place} is an empty answer")
    elif content is None:
        raise ValueError(f"message {place} has no `content`")


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """Read a file of instructions.

    Args:
        path: JSON lines.

    Raises:
        JaxmoeError: there is no such file, or lines are no JSON, lack fields, or have empty answers or none; offenders
            are listed by line.
    """
    path = at_home(path)
    text, _ = read_text(path)
    form = "each line is to be an object with `messages`, or with `prompt` and `response`"
    return [
        Dialogue(line.messages or (), line.tools, line.documents, line.chat_template_kwargs or {}, number)
        for number, line in json_lines(path, text, _Line, form)
    ]


def paragraphs(messages: Sequence[Message]) -> str:
    """Spell a dialogue as its messages' texts, an empty line after each.

    Raises:
        JaxmoeError: a message is more than a text.

    Example:
        >>> paragraphs([{"role": "user", "content": "One and one?"}])
        'One and one?\\n\\n'
    """
    return "".join(f"{_plain(message)}\n\n" for message in messages)


def _plain(message: Message) -> str:
    more = sorted(key for key, value in message.items() if value and key not in ("role", "content", "name"))
    calls = [key for key in more if key in ("tool_calls", "reasoning_content", "reasoning", "thinking")]
    parts = message.get("content") or ""
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    kinds = sorted({str(part.get("type")) for part in parts} - {"text"})
    if calls or kinds:
        raise JaxmoeError(
            f"a message has {', '.join([*calls, *kinds])}, and the checkpoint has no chat template to spell it: copy"
            " chat_template.jinja from the model's source"
        )
    return "".join(str(part.get("text", "")) for part in parts)
