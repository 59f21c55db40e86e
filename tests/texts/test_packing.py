"""Packing: every token once, in order, apart from other documents, in few rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import Document, pack


def numbered(sizes):
    """Return documents whose tokens are all different, so that each can be found again."""
    ends = np.cumsum(sizes)
    return [Document(np.arange(end - size, end, dtype=np.int32), np.ones(size, bool)) for size, end in zip(sizes, ends)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=30), st.integers(2, 12))
def test_every_token_stands_once_in_order_and_apart(sizes, length):
    if max(sizes) < 2:
        return
    rows = pack(numbered(sizes), length)
    assert sorted(rows.ids[rows.documents > 0].tolist()) == list(range(sum(sizes)))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for ids, documents, learned in zip(*rows):
        for number in range(1, documents.max(initial=0) + 1):
            own = ids[documents == number]
            # A piece is a run of neighbours of one document.
            assert np.all(np.diff(own) == 1)
            assert len(set(owner[own])) == 1
            assert not learned[documents == number][0]
            assert learned[documents == number][1:].all()
        assert not learned[documents == 0].any()
        assert np.all(documents[np.argmin(documents > 0) :] == 0) or (documents > 0).all()


def test_few_rows_are_needed():
    sizes = [7, 3, 5, 5, 4, 6, 2, 8]
    assert len(pack(numbered(sizes), 10).ids) == 4


def test_what_is_not_to_be_learned_is_not():
    (ids, learned) = np.arange(4, dtype=np.int32), np.array([True, False, True, True])
    assert pack([Document(ids, learned)], 6).learned.tolist() == [[False, False, True, True, False, False]]


@pytest.mark.parametrize(
    ("documents", "length", "message"),
    [
        ([], 4, "nothing to learn"),
        (numbered([1, 1]), 4, "nothing to learn"),
        (numbered([5]), 1, "length of at least 2"),
    ],
)
def test_what_cannot_be_packed(documents, length, message):
    with pytest.raises(JaxmoeError, match=message):
        pack(documents, length)
