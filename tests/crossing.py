"""Combinations of what tests are parametrised by: every value in `make test`, every combination in `make test-slow`."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """Return all combinations of values, those slow that are not needed for each value to occur once.

    Example:
        >>> [not own.marks for own in crossed("ab", "xyz")]
        [True, False, True, False, True, False]
    """
    wanted = {tuple(place % len(axis) for axis in axes) for place in range(max(map(len, axes)))}
    return [
        pytest.param(
            *(axis[place] for axis, place in zip(axes, places, strict=True)),
            marks=[] if places in wanted else [pytest.mark.slow],
        )
        for places in product(*(range(len(axis)) for axis in axes))
    ]
