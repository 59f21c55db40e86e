"""Whether a sequence of tokens repeats itself, as the texts of a damaged model do.

The share of n-grams that have occurred before is seq-rep-n of Welleck et al., "Neural text generation with unlikelihood
training" (2019). A period is stricter: the end of the sequence is one block of tokens over and over.
"""

import numpy as np

NGRAM = 4
MARGIN = 0.3
"""How much more than the text itself a continuation may repeat."""


def repetition(ids: np.ndarray, n: int = NGRAM) -> float:
    """Return the share of the n-grams that have occurred before, in [0, 1].

    Example:
        >>> repetition(np.array([1, 2, 1, 2, 1, 2]), 2)
        0.6
    """
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def period(ids: np.ndarray) -> int | None:
    """Return the shortest period of the end of a sequence, None where there is none.

    The periodic end must be half of the sequence or more, and hold the repeated block at least three times.

    Example:
        >>> period(np.array([9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1])), period(np.arange(12))
        (3, None)
    """
    for length in range(1, len(ids) // 3 + 1):
        differs = np.flatnonzero(ids[length:] != ids[:-length])
        # The end of the sequence, from the first token after the last difference minus one block.
        periodic = len(ids) - (int(differs[-1]) + 1 if differs.size else 0)
        if periodic >= max(3 * length, -(-len(ids) // 2)):
            return length
    return None


def degenerate(ids: np.ndarray, text: np.ndarray) -> bool:
    """Return whether a continuation repeats itself as the text that really follows does not.

    Args:
        ids: the continuation.
        text: what follows in the text.

    Example:
        >>> degenerate(np.ones(12), np.arange(12)), degenerate(np.ones(12), np.ones(12))
        (True, False)
    """
    if period(ids) is not None and period(text) is None:
        return True
    return repetition(ids) > repetition(text) + MARGIN
