"""Windows of tokens: a text is tokenised as a whole and cut into rows of equal length, without overlap.

A tail that does not fill a window is left out and counted. Documents of one text follow each other, each ended by the
model's end-of-sequence token if it has one. The first token of every window and of every document does not count for
statistics: what attention does with a first token is like nothing else, and its huge activations would drown the rest.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.texts.reading import Text, read_texts
from jaxmoe.texts.tokenizer import Tokenizer


class Tokens(NamedTuple):
    """A tokenised text.

    Args:
        ids: int32, `[token]`.
        starts: which tokens are the first of a document, bool, `[token]`.
    """

    ids: np.ndarray
    starts: np.ndarray


class Windows(NamedTuple):
    """A text in windows.

    Args:
        name: of the text.
        fingerprint: of the text.
        ids: int32, `[window, length]`.
        counted: which tokens count for statistics, bool, `[window, length]`.
        left_out: tokens at the end of the text that do not fill a window.
    """

    name: str
    fingerprint: str
    ids: np.ndarray
    counted: np.ndarray
    left_out: int


def encode_documents(text: Text, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the ids of each document of a text.

    Raises:
        JaxmoeError: a document cannot be tokenised, or has a token that the model has no embedding of.
    """
    for document in text.documents:
        try:
            yield tokenizer.encode(document)
        except JaxmoeError as error:
            raise JaxmoeError(f"{text.path}: {error}") from None


def tokenize(text: Text, tokenizer: Tokenizer) -> Tokens:
    """Tokenise a text, its documents one by one, and join them by the tokenizer's end token if there is one."""
    parts, starts = [], []
    for ids in encode_documents(text, tokenizer):
        if not ids.size:
            continue
        if parts and tokenizer.end is not None:
            parts.append(np.array([tokenizer.end], np.int32))
            starts.append(np.zeros(1, bool))
        parts.append(ids)
        starts.append(np.arange(len(ids)) == 0)
    if not parts:
        return Tokens(np.zeros(0, np.int32), np.zeros(0, bool))
    return Tokens(np.concatenate(parts), np.concatenate(starts))


def windows(
    tokens: Tokens, length: int, count: int | None = None, *, name: str = "text", fingerprint: str = ""
) -> Windows:
    """Cut a tokenised text into windows.

    Args:
        tokens: of the text.
        length: tokens in a window, at least 2.
        count: so many windows evenly spread over the text, all if None or if there are no more.
        name: of the text.
        fingerprint: of the text.

    Raises:
        JaxmoeError: the text is shorter than one window.

    Example:
        >>> tokens = Tokens(np.arange(11, dtype=np.int32), np.arange(11) == 7)
        >>> cut = windows(tokens, 3, 2)
        >>> cut.ids.tolist(), cut.left_out, cut.counted.tolist()
        ([[0, 1, 2], [6, 7, 8]], 2, [[False, True, True], [False, False, True]])
    """
    if length < 2:
        raise JaxmoeError(f"windows of {length} tokens: give a length of at least 2")
    if count is not None and count < 1:
        raise JaxmoeError(f"{count} windows of each text: give at least 1")
    complete = len(tokens.ids) // length
    if not complete:
        raise JaxmoeError(f"fewer than {length} tokens in {name} ({len(tokens.ids)}): {_SHORT}")
    chosen = np.arange(complete)
    if count is not None and count < complete:
        # Spread, not the first: neighbouring windows come from the same few documents.
        chosen = (2 * np.arange(count) + 1) * complete // (2 * count)
    starts = tokens.starts[: complete * length].reshape(complete, length)[chosen]
    return Windows(
        name=name,
        fingerprint=fingerprint,
        ids=tokens.ids[: complete * length].reshape(complete, length)[chosen],
        counted=~starts & (np.arange(length) > 0),
        left_out=len(tokens.ids) - complete * length,
    )


def window_length(longest: int | None, asked: int | None = None) -> int:
    """Return how many tokens a window has: what is asked for, else 256 for a context of up to 2048, else 2048.

    Args:
        longest: context of the model, `max_position_embeddings` in its config; None where it is not there.
        asked: a length; None for the default.

    Raises:
        JaxmoeError: the model takes fewer tokens.

    Example:
        >>> window_length(2048), window_length(32768), window_length(None), window_length(128), window_length(128, 64)
        (256, 2048, 2048, 128, 64)
    """
    if asked is None:
        return _LONG if longest is None or longest > _LONG else min(_USUAL, longest)
    if longest is not None and asked > longest:
        raise JaxmoeError(f"windows of {asked} tokens: the model takes {longest}; give a smaller length")
    return asked


_USUAL, _LONG = 256, 2048
_SHORT = "give a longer text or a smaller length"


def text_windows(
    paths: Sequence[str | Path], tokenizer: Tokenizer, *, length: int, count: int | None = None
) -> tuple[Windows, ...]:
    """Read texts, tokenise them and cut them into windows.

    Args:
        paths: as `read_texts` takes them.
        tokenizer: of the model.
        length: tokens in a window, at least 2.
        count: so many windows of each text, evenly spread over it; all if None.

    Raises:
        JaxmoeError: a text cannot be read, or some are shorter than one window; all of those are listed.
    """
    texts = read_texts(paths)
    tokens = [tokenize(text, tokenizer) for text in texts]
    short = [f"{text.path} ({len(ids)})" for text, (ids, _) in zip(texts, tokens) if len(ids) < length]
    if short:
        raise JaxmoeError(f"fewer than {length} tokens in {', '.join(short)}: {_SHORT}")
    return tuple(
        windows(each, length, count, name=text.name, fingerprint=text.fingerprint) for text, each in zip(texts, tokens)
    )
