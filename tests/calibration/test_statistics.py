"""Records of a layer: zeros, sums and what is derived from them."""

import numpy as np
import pytest
from random_statistics import SHAPE, random_record

from jaxmoe.calibration.statistics import FIELDS, LayerStatistics
from jaxmoe.errors import JaxmoeError


def test_sums_and_maxima():
    first, second = random_record(0), random_record(1)
    both = first + second
    assert (both.tokens, both.sequences) == (15, 5)
    for name in FIELDS:
        combine = np.maximum if name == "channel_peaks" else np.add
        assert np.array_equal(getattr(both, name), combine(getattr(first, name), getattr(second, name))), name


def test_zeros_is_neutral():
    record = random_record(3)
    same = LayerStatistics.zeros(SHAPE, gradients=True) + record
    assert same.tokens == record.tokens
    assert all(np.array_equal(same.arrays()[name], array) for name, array in record.arrays().items())


EXPERT = {"input_moments", "intermediate_moments"}
WEIGHTED = {"weighted_input_moments", "weighted_intermediate_moments"}


@pytest.mark.parametrize(
    ("moments", "gradients", "absent"),
    [
        ("none", False, {"input_moment", *EXPERT, *WEIGHTED}),
        ("pooled", True, {*EXPERT, *WEIGHTED}),
        ("expert", True, WEIGHTED),
        ("weighted", True, set()),
    ],
)
def test_what_was_not_asked_for_is_none(moments, gradients, absent):
    record = LayerStatistics.zeros(SHAPE, moments=moments, gradients=gradients)
    fisher = set() if gradients else {"fisher_gate", "fisher_up", "fisher_down"}
    assert {name for name in FIELDS if getattr(record, name) is None} == absent | fisher


def test_no_gate_has_no_fisher_of_it():
    record = LayerStatistics.zeros(SHAPE._replace(gated=False), gradients=True)
    assert record.fisher_gate is None
    assert record.fisher_up is not None


def test_different_contents_do_not_add_up():
    with pytest.raises(JaxmoeError, match="fisher_down, fisher_gate, fisher_up"):
        random_record(0) + random_record(0, gradients=False)
    with pytest.raises(JaxmoeError, match="do not add up"):
        random_record(0) + random_record(0, SHAPE._replace(hidden=8))


def test_wrong_arrays_are_all_named():
    arrays = random_record(0).arrays()
    arrays["counts"] = arrays["counts"].astype(np.int32)
    arrays["input_sums"] = arrays["input_sums"][:, :2]
    with pytest.raises(JaxmoeError, match=r"counts is int32 .* input_sums is float64 \(5, 2\), not float64 \(5, 4\)"):
        LayerStatistics(shape=SHAPE, tokens=1, sequences=1, **arrays)


def test_unknown_moments_are_refused():
    with pytest.raises(JaxmoeError, match=r"'all'.*none, pooled, expert"):
        LayerStatistics.zeros(SHAPE, moments="all")


def test_derived_values():
    record = LayerStatistics.zeros(SHAPE)
    record.counts[:] = [4, 0, 1, 2, 3]
    record.input_sums[:] = np.arange(5)[:, None]
    record.output_sums[0] = 2.0
    record = LayerStatistics(shape=SHAPE, tokens=10, sequences=1, **record.arrays())
    assert record.frequency.tolist() == [0.4, 0.0, 0.1, 0.2, 0.3]
    assert record.mean_inputs[:, 0].tolist() == [0.0, 1.0, 2.0, 1.5, 4 / 3]
    assert record.mean_outputs[0].tolist() == [0.5] * 4
    assert record.never_routed == (1,)
    assert record.starved(3) == (1, 2, 3)
