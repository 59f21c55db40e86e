"""A checkpoint's tokenizer: `tokenizer.json`, run by the tokenizers library, without transformers.

The ids are those that transformers gives with `add_special_tokens=False`: no truncation, no padding, no beginning or
end; words of the text that spell a special token become that token.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint import files, hub
from jaxmoe.checkpoint.families import lookup
from jaxmoe.errors import JaxmoeError

TOKENIZER = "tokenizer.json"


def tokenizer_fingerprint(folder: Path) -> str | None:
    """Return the SHA-256 of a checkpoint's tokenizer, None if it has none."""
    path = folder / TOKENIZER
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else None


class Tokenizer:
    """Turns text into the token ids of one checkpoint.

    Args:
        path: a `tokenizer.json`.
        vocabulary: the model's number of token ids.
        end: the id that ends a document, or None.

    Example:
        >>> from jaxmoe.data import demo_checkpoint
        >>> tokenizer = Tokenizer.open(demo_checkpoint())
        >>> tokenizer.decode(tokenizer.encode("a few words"))
        'a few words'
    """

    def __init__(self, path: Path, *, vocabulary: int, end: int | None = None):
        # Imported here: jaxmoe is to be imported in no time.
        import tokenizers

        content = path.read_bytes()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise JaxmoeError(f"{path} cannot be read ({error}): fetch it again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.path, self.vocabulary, self.end = path, vocabulary, end
        self.fingerprint = sha256(content).hexdigest()
        last = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if last >= vocabulary:
            raise self._mismatch(last)
        if end is not None and not 0 <= end < vocabulary:
            raise JaxmoeError(f"{path.parent / files.CONFIG}: eos_token_id {end} is not below vocab_size {vocabulary}")

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> "Tokenizer":
        """Open the tokenizer of a checkpoint, original or written by jaxmoe.

        Args:
            source: a folder or a hub id.
            revision: branch, tag or commit on the hub.

        Raises:
            JaxmoeError: there is no `tokenizer.json`, or it does not match the model's vocabulary.
        """
        folder = hub.resolve(source, revision)
        config = files.read_config(folder)
        path = folder / TOKENIZER
        if not path.is_file():
            raise JaxmoeError(
                f"{folder} has no {TOKENIZER}: copy it from the model's source, or write it with transformers:"
                " AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        vocabulary = lookup(config, "vocab_size|text_config.vocab_size")
        if type(vocabulary) is not int:
            raise JaxmoeError(f"{folder / files.CONFIG} has no vocab_size: add the number of token ids")
        end = lookup(config, "eos_token_id|text_config.eos_token_id")
        if isinstance(end, list):
            # Chat models list several; the first is the one that ends a document.
            end = end[0] if end else None
        return cls(path, vocabulary=vocabulary, end=end)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32, without special tokens at its ends."""
        ids = np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        if ids.size and ids.max() >= self.vocabulary:
            raise self._mismatch(int(ids.max()))
        return ids

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of some ids, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def _mismatch(self, token: int) -> JaxmoeError:
        return JaxmoeError(
            f"the tokenizer does not match the model: {self.path} has token id {token}, and vocab_size in"
            f" {files.CONFIG} is {self.vocabulary}; copy the tokenizer from the source of this very model"
        )


def check_same(tokenizer: Tokenizer, other: Tokenizer) -> None:
    """Raise if two tokenizers differ in more than the layout of their files and how they would pad."""
    if tokenizer.fingerprint != other.fingerprint and _rules(tokenizer.path) != _rules(other.path):
        raise JaxmoeError(
            f"the tokenizers {tokenizer.path} and {other.path} differ, so that the models speak of different tokens:"
            " compare a model with its own original"
        )


def _rules(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name not in ("padding", "truncation")}
