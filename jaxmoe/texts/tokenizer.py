"""A checkpoint's tokenizer, run by the tokenizers library, without transformers.

The ids are those that transformers gives with `add_special_tokens=False`: no truncation, no padding, no beginning or
end; words of the text that spell a special token become that token.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint import files, hub
from jaxmoe.checkpoint.families import lookup
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts.packing import Document
from jaxmoe.texts.tokenizer_files import Backend, guarded, read_backend


class Tokenizer:
    """Turns text into the token ids of one checkpoint.

    Args:
        backend: what runs, from which file.
        vocabulary: the model's number of token ids.
        end: the id that ends a document, or None.

    Example:
        >>> from jaxmoe.data import demo_checkpoint
        >>> tokenizer = Tokenizer.open(demo_checkpoint())
        >>> tokenizer.decode(tokenizer.encode("a few words"))
        'a few words'
    """

    def __init__(self, backend: Backend, *, vocabulary: int, end: int | None = None):
        self._tokenizer, self.path, self.fingerprint = backend
        self.vocabulary, self.end = vocabulary, end
        with guarded(f"{self.path} cannot be used", "fetch it again"):
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            # Added tokens may lie beyond the model's embeddings, as fine-tuning leaves them: texts may not use those.
            last = max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        if last >= vocabulary:
            raise JaxmoeError(
                f"the tokenizer does not match the model: {self.path} has token id {last}, and vocab_size in"
                f" {files.CONFIG} is {vocabulary}; copy the tokenizer from the source of this very model"
            )

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> "Tokenizer":
        """Open the tokenizer of a checkpoint, original or written by jaxmoe.

        Args:
            source: a folder or a hub id.
            revision: branch, tag or commit on the hub.

        Raises:
            JaxmoeError: there is no tokenizer that can be read, or it does not match the model's vocabulary.
        """
        folder = hub.resolve(source, revision)
        config, path = files.read_config(folder), folder / files.CONFIG
        vocabulary = lookup(config, "vocab_size|text_config.vocab_size")
        if type(vocabulary) is not int:
            raise JaxmoeError(f"{path} has no vocab_size: add the number of token ids")
        end = lookup(config, "eos_token_id|text_config.eos_token_id")
        if isinstance(end, list):
            # Chat models list several; the first is the one that ends a document.
            end = end[0] if end else None
        if end is not None and not 0 <= end < vocabulary:
            raise JaxmoeError(f"{path}: eos_token_id {end} is not below vocab_size {vocabulary}")
        return cls(read_backend(folder, config["model_type"]), vocabulary=vocabulary, end=end)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32, without special tokens at its ends.

        Raises:
            JaxmoeError: the text cannot be encoded in UTF-8, or has a token that the model has no embedding of.
        """
        return self._checked(self._encoding(text).ids)

    def document(self, text: str, learned: Iterable[tuple[int, int]]) -> Document:
        """Return the tokens of a text of which those are learned that touch one of some spans of characters.

        Args:
            text: of the document.
            learned: spans, the first character of each and the one after its last.
        """
        encoding = self._encoding(text)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        touched = np.zeros(len(starts), bool)
        for start, end in learned:
            if start < end:
                touched |= (starts < end) & (ends > start)
        return Document(self._checked(encoding.ids), touched)

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of some ids, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def rules(self) -> dict[str, Any]:
        """Return what the tokenizer does, however it is laid out in files and would pad."""
        content = json.loads(self._tokenizer.to_str())
        return {name: value for name, value in content.items() if name not in ("padding", "truncation")}

    def _encoding(self, text: str) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"half a surrogate pair ({text[error.start]!a}) at character {error.start}"
            raise JaxmoeError(f"the text holds {half}, which is no text: take it out") from None
        with guarded(f"{self.path} fails on a text", "fetch it again"):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def _checked(self, found: list[int]) -> np.ndarray:
        ids = np.asarray(found, np.int64)
        if ids.size and ids.max() >= self.vocabulary:
            token = int(ids.max())
            raise JaxmoeError(
                f"the text holds {self._tokenizer.id_to_token(token)!r}, token id {token} in {self.path}, and the model"
                f" has embeddings of {self.vocabulary} only: take it out of the text"
            )
        return ids.astype(np.int32)


def check_same(tokenizer: Tokenizer, other: Tokenizer) -> None:
    """Raise if two tokenizers differ in more than the layout of their files and how they would pad."""
    if tokenizer.fingerprint != other.fingerprint and tokenizer.rules() != other.rules():
        raise JaxmoeError(
            f"the tokenizers {tokenizer.path} and {other.path} differ, so that the models speak of different tokens:"
            " compare a model with its own original"
        )
