"""Which chat template a checkpoint has, found where transformers finds it.

`chat_template.jinja` is the default one, `additional_chat_templates/NAME.jinja` are others, and only where there is
none of these files those count that `tokenizer_config.json` holds, one or several with names; last comes
`chat_template.json`, as processors of images wrote it. Dialogues with tools take the one called `tool_use`.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from jaxmoe.checkpoint.records import read_bytes, read_record, unreadable
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts.tokenizer_config import MEND, TOKENIZER_CONFIG, TokenizerConfig, read_tokenizer_config, text

FILE, FOLDER, PROCESSOR = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
LARGEST = 1 << 22
"""Bytes of the largest template: the longest published ones have 20,000."""


class ChatTemplate(NamedTuple):
    """The chat templates of a checkpoint.

    Args:
        path: the file or folder that holds them.
        templates: what each is, by name.
        tokens: the special tokens that a template can name, such as `bos_token`.
    """

    path: Path
    templates: Mapping[str, str]
    tokens: Mapping[str, str]

    @property
    def dated(self) -> bool:
        """Whether texts depend on the time at which they are written."""
        return any("strftime_now" in source for source in self.templates.values())

    def name(self, tools: Any) -> str:
        """Return which template spells a dialogue with such tools, None for none.

        Raises:
            JaxmoeError: there are several, and none is the default.
        """
        if tools is not None and "tool_use" in self.templates:
            return "tool_use"
        if "default" not in self.templates:
            raise JaxmoeError(
                f"{self.path} has the chat templates {', '.join(sorted(self.templates))}, and none of them is the"
                " default: name one so"
            )
        return "default"


class _Processor(msgspec.Struct):
    chat_template: str


def chat_template(folder: Path) -> ChatTemplate | None:
    """Return a checkpoint's chat templates, None if it has none.

    Raises:
        JaxmoeError: a file is no template, or holds something else than it should.

    Example:
        >>> from jaxmoe.data import demo_checkpoint
        >>> chat_template(demo_checkpoint()) is None
        True
    """
    config = read_tokenizer_config(folder)
    tokens = {name: text(token) for name, token in config.named_tokens().items()}
    found = ((path, templates) for path, templates in _candidates(folder, config) if templates)
    return next((ChatTemplate(path, templates, tokens) for path, templates in found), None)


def _candidates(folder: Path, config: TokenizerConfig) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield what could hold the templates, and those found there, in the order of precedence."""
    templates, others = {}, folder / FOLDER
    if os.path.lexists(path := folder / FILE):
        templates["default"] = _source(path)
    if os.path.isdir(others):
        try:
            names = sorted(name for name in os.listdir(others) if name.endswith(".jinja"))
        except OSError as error:
            raise unreadable(others, error) from None
        templates |= {name.removesuffix(".jinja"): _source(others / name) for name in names}
    yield (folder / FILE if "default" in templates else others), templates
    if isinstance(found := config.chat_template, list):
        found = {each.name: each.template for each in found}
    yield folder / TOKENIZER_CONFIG, {"default": found} if isinstance(found, str) else found or {}
    if os.path.lexists(path := folder / PROCESSOR):
        yield path, {"default": read_record(path, _Processor, MEND).chat_template}


def _source(path: Path) -> str:
    try:
        return read_bytes(path, limit=LARGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise JaxmoeError(f"{path} is not UTF-8 at byte {error.start}: {MEND}") from None
