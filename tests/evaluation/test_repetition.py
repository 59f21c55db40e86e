"""Repetition of constructed sequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.evaluation.repetition import degenerate, period, repetition

VARIED = np.arange(32)
LOOP = np.concatenate([np.arange(100, 112), np.tile([7, 8, 9, 6, 5], 4)])


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.ones(32), 1),
        (np.tile([1, 2], 16), 2),
        (LOOP, 5),
        (np.concatenate([np.arange(20), np.tile([7, 8], 3)]), None),  # repeats, but not for long
        (np.concatenate([np.tile([7, 8], 10), np.arange(20, 32)]), None),  # found its way out
        (np.tile(np.arange(11), 2), None),  # twice is no period
        (VARIED, None),
        (np.zeros(0), None),
        (np.zeros(1), None),
    ],
)
def test_period(ids, expected):
    assert period(ids) == expected


@given(st.lists(st.integers(0, 2), max_size=24), st.integers(1, 8))
def test_a_period_is_found_by_the_definition_and_no_other(ids, tail):
    ids = np.array([*ids, *(ids[-tail:] * 3)], int)

    def periodic(length):
        for begin in range(len(ids)):
            part = ids[begin:]
            if all(part[i] == part[i + length] for i in range(len(part) - length)):
                return len(part) >= max(3 * length, len(ids) / 2)
        return False

    expected = next((length for length in range(1, len(ids) // 3 + 1) if periodic(length)), None)
    assert period(ids) == expected


def test_share_of_repeated_ngrams():
    assert repetition(VARIED) == 0
    assert repetition(np.ones(32)) == pytest.approx(28 / 29)
    assert repetition(np.array([1, 2, 3, 4, 9, 1, 2, 3, 4]), 4) == pytest.approx(1 / 6)
    assert repetition(np.arange(3)) == 0


def test_what_the_text_does_too_is_not_degenerate():
    assert degenerate(LOOP, VARIED)
    assert degenerate(np.tile([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 3)[:32], VARIED), "a loop of four lines"
    assert not degenerate(VARIED, VARIED)
    assert not degenerate(LOOP, LOOP)
    assert not degenerate(VARIED, LOOP)
