"""Documents packed into rows of equal length for training, as tightly as best fit packs them.

Several short documents share a row, each with a number of its own, by which attention keeps them apart; a document that
is longer than a row is cut into pieces, which do not see each other. Nothing is dropped.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxmoe.errors import JaxmoeError


class Document(NamedTuple):
    """Tokens of a document, int32, `[token]`, and which of them are to be learned, bool, `[token]`."""

    ids: np.ndarray
    learned: np.ndarray


class Rows(NamedTuple):
    """Packed documents.

    Args:
        ids: int32, `[row, length]`; 0 where a row is not filled.
        documents: the number of each token's document within its row from 1 on, 0 where a row is not filled; int32.
        learned: which tokens a loss is to predict, each from those before it in its document; bool.
    """

    ids: np.ndarray
    documents: np.ndarray
    learned: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of tokens, without the filling."""
        return int((self.documents > 0).sum())


def pack(documents: Iterable[Document], length: int) -> Rows:
    """Pack documents into rows of `length` tokens.

    Args:
        documents: in any number and of any length; what is left of a document that fills rows is packed like others.
        length: tokens in a row, at least 2.

    Raises:
        JaxmoeError: the length is too small, or there is nothing to learn.

    Example:
        >>> a, b = (Document(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in (5, 2))
        >>> rows = pack([a, b], 4)
        >>> rows.ids.tolist(), rows.documents.tolist()
        ([[0, 1, 2, 3], [4, 0, 1, 0]], [[1, 1, 1, 1], [1, 2, 2, 0]])
    """
    if length < 2:
        raise JaxmoeError(f"rows of {length} tokens: give a length of at least 2")
    rows: list[list[Document]] = []
    # Rows with room, sorted by how much, then by number: the fullest that a piece fits into takes it.
    room: list[tuple[int, int]] = []
    for document in documents:
        for start in range(0, len(document.ids), length):
            piece = Document(*(part[start : start + length] for part in document))
            size = len(piece.ids)
            found = bisect_left(room, (size, 0))
            if found < len(room):
                free, row = room.pop(found)
            else:
                free, row = length, len(rows)
                rows.append([])
            rows[row].append(piece)
            if free > size:
                insort(room, (free - size, row))
    packed = Rows(*(np.zeros((len(rows), length), dtype) for dtype in (np.int32, np.int32, bool)))
    for row, pieces in enumerate(rows):
        start = 0
        for number, piece in enumerate(pieces, start=1):
            span = slice(start, start + len(piece.ids))
            packed.ids[row, span] = piece.ids
            packed.documents[row, span] = number
            packed.learned[row, span] = piece.learned
            # Nothing precedes a first token.
            packed.learned[row, start] = False
            start = span.stop
    if not packed.learned.any():
        raise JaxmoeError("nothing to learn: the documents are empty or single tokens; give longer texts")
    return packed
