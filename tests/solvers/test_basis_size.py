"""The rule for the number of bases: bounds, symmetry, and that no neighbour is much better."""

import numpy as np
import pytest

from jaxmoe.solvers.basis_size import choose_bases, lies_transposed
from jaxmoe.solvers.variable_projection import variable_projection


@pytest.mark.parametrize("kept", [0.02, 0.2, 0.4, 0.6, 0.75, 0.834, 0.97])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 4, 40), (16, 64, 128), (384, 2048, 7168), (8, 512, 128)])
def test_bases_are_possible_and_can_spend_the_budget(shape, kept):
    experts, out, in_ = shape
    bases = choose_bases(shape, kept)
    assert isinstance(bases, int)
    assert 1 <= bases <= experts
    assert choose_bases((experts, in_, out), kept) == bases
    rows, columns = min(out, in_), max(out, in_)
    full = experts * rows * rows + bases * rows * columns + experts * bases
    assert full >= kept * experts * rows * columns or bases == experts


def test_bases_lie_on_the_longer_side():
    assert lies_transposed(512, 128)
    assert not lies_transposed(128, 512)
    assert not lies_transposed(64, 64)


def test_the_choice_is_near_the_best_of_all():
    """Independent experts: other numbers of bases at equal size, each with the rank that it leaves."""
    kept, rng = 0.5, np.random.default_rng(0)
    experts, rows, columns = shape = (12, 16, 32)
    weight = rng.normal(size=shape).astype(np.float32)
    errors = {}
    for bases in {choose_bases(shape, kept), 1, 7}:
        rank = int((kept * weight.size - experts * bases) // (experts * rows + bases * columns))
        fit = variable_projection(weight, bases=bases, rank=min(rank, rows), steps=150)
        errors[bases] = float(np.sqrt(np.mean(np.square(fit.error))))
    assert errors[choose_bases(shape, kept)] < 1.04 * min(errors.values()), errors


def test_fewer_bases_where_moments_weigh_them():
    assert [choose_bases((16, 128, 128), kept, weighted=True) for kept in (0.8, 0.53)] == [3, 4]
    assert choose_bases((16, 64, 128), 0.95, weighted=True) == choose_bases((16, 64, 128), 0.95)
