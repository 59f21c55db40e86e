"""`tokenizer_config.json`: a tokenizer's class, special tokens and chat templates, with the older files beside it.

Older checkpoints keep special tokens in `special_tokens_map.json` and added ones in `added_tokens.json`; as in
transformers, both count only where `tokenizer_config.json` has no `added_tokens_decoder`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from jaxmoe.checkpoint.records import read_record

TOKENIZER_CONFIG = "tokenizer_config.json"
MEND = "fetch it again"


class AddedToken(msgspec.Struct, frozen=True):
    """A token beside the vocabulary, with the fields of the tokenizers library; `normalized` None: unless special."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False


class NamedTemplate(msgspec.Struct):
    """One of several chat templates."""

    name: str
    template: str


Token = str | AddedToken
Named = Token | None | UnsetType


class SpecialTokens(msgspec.Struct):
    """The special tokens that have names; None is none, a missing one is the class's own."""

    bos_token: Named = UNSET
    eos_token: Named = UNSET
    unk_token: Named = UNSET
    sep_token: Named = UNSET
    pad_token: Named = UNSET
    cls_token: Named = UNSET
    mask_token: Named = UNSET


class TokenizerConfig(SpecialTokens):
    """What a checkpoint says of its tokenizer beside the vocabulary."""

    tokenizer_class: str | None = None
    auto_map: Any = None
    add_prefix_space: bool | None = None
    added_tokens_decoder: dict[str, AddedToken] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None
    additional_special_tokens: list[Token] | None = None
    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None

    @property
    def kind(self) -> str | None:
        """The class, without the `Fast` of earlier versions."""
        return self.tokenizer_class and self.tokenizer_class.removesuffix("Fast")

    def named_tokens(self, kind: str | None = None) -> dict[str, Token]:
        """Return the special tokens by name, with those that a class has of its own, `kind` or the one in the file.

        Example:
            >>> TokenizerConfig(bos_token=None, pad_token="<pad>").named_tokens("GPT2Tokenizer")
            {'eos_token': '<|endoftext|>', 'unk_token': '<|endoftext|>', 'pad_token': '<pad>'}
        """
        own = _OWN_TOKENS.get(kind or self.kind or "", {})
        given = {name: getattr(self, name) for name in SpecialTokens.__struct_fields__}
        given = {name: own.get(name) if token is UNSET else token for name, token in given.items()}
        return {name: token for name, token in given.items() if token is not None}

    def added_tokens(self, kind: str | None = None) -> list[AddedToken]:
        """Return the tokens to add to a vocabulary, in the order in which they get ids."""
        extra = self.extra_special_tokens or self.additional_special_tokens or []
        added = [token for _, token in sorted((self.added_tokens_decoder or {}).items(), key=lambda item: int(item[0]))]
        for token in (*self.named_tokens(kind).values(), *(extra.values() if isinstance(extra, dict) else extra)):
            if text(token) not in map(text, added):
                added.append(AddedToken(token, special=True) if isinstance(token, str) else token)
        return added


_OWN_TOKENS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}


def text(token: Token) -> str:
    """Return what a token reads."""
    return token if isinstance(token, str) else token.content


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Return what a checkpoint's files say of its tokenizer; an empty record where there are none.

    Raises:
        JaxmoeError: a file holds something else than it should.
    """
    config = TokenizerConfig()
    if os.path.lexists(path := folder / TOKENIZER_CONFIG):
        config = read_record(path, TokenizerConfig, MEND)
    if config.added_tokens_decoder is None:
        _add_older(folder, config)
    return config


def _add_older(folder: Path, config: TokenizerConfig) -> None:
    if os.path.lexists(path := folder / "special_tokens_map.json"):
        older = read_record(path, SpecialTokens, MEND)
        for name in SpecialTokens.__struct_fields__:
            if (token := getattr(older, name)) is not UNSET:
                setattr(config, name, token)
    if os.path.lexists(path := folder / "added_tokens.json"):
        special = {*map(text, config.named_tokens().values()), *map(text, config.additional_special_tokens or ())}
        ids = read_record(path, dict[str, int], MEND)
        config.added_tokens_decoder = {
            str(number): AddedToken(token, normalized=token not in special, special=token in special)
            for token, number in ids.items()
        }
