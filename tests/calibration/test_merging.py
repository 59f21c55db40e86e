"""Merging statistics of several runs."""

import dataclasses

import numpy as np
import pytest
from random_statistics import RECORD, records

from jaxmoe.calibration.folder import Statistics
from jaxmoe.calibration.merging import merge
from jaxmoe.calibration.record import Source
from jaxmoe.calibration.writer import save
from jaxmoe.errors import JaxmoeError

OTHER = dataclasses.replace(RECORD, domains={"web": (Source("c", 1, 128, 3),), "news": (Source("d", 5, 256, 8),)})


def test_domains_add_up(tmp_path):
    first, second = records(), records(OTHER, seed=1)
    merged = merge(
        [save(tmp_path / "a", RECORD, first).folder, save(tmp_path / "b", OTHER, second).folder], tmp_path / "m"
    )
    assert merged.domains == ("code", "web", "news")
    assert merged.record.domains["web"] == (Source("b", 4, 256, 9), Source("c", 1, 128, 3))
    expected = {
        "code": first["code"][4],
        "web": first["web"][4] + second["web"][4],
        "news": second["news"][4],
    }
    for domain, total in expected.items():
        found = merged.layer(4, [domain])
        assert (found.tokens, found.sequences) == (total.tokens, total.sequences)
        for name, array in total.arrays().items():
            np.testing.assert_allclose(found.arrays()[name], array, rtol=2e-7, err_msg=name)
    # The same command again finds its result.
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m").record == merged.record


def test_a_text_counts_once(tmp_path):
    save(tmp_path / "a", RECORD, records())
    again = dataclasses.replace(RECORD, domains={"renamed": (Source("b", 4, 256, 9),)})
    save(tmp_path / "b", again, records(again))
    with pytest.raises(JaxmoeError, match=r"renamed of .*b is the text of web of .*a"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "m.partial").exists()
    assert "renamed" in merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m", force=True).domains


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "x"}, "differ in model"),
        ({"tokenizer": "x"}, "differ in tokenizer"),
        ({"gradients": None}, "differ in gradients"),
        ({"layers": {1: RECORD.layers[1]}}, "differ in layers"),
    ],
)
def test_runs_of_another_kind(tmp_path, change, said):
    save(tmp_path / "a", RECORD, records())
    other = dataclasses.replace(OTHER, **change)
    save(tmp_path / "b", other, records(other))
    with pytest.raises(JaxmoeError, match=said):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")


def test_what_is_no_merge(tmp_path):
    save(tmp_path / "a", RECORD, records())
    with pytest.raises(JaxmoeError, match="at least two"):
        merge([tmp_path / "a"], tmp_path / "m")
    with pytest.raises(JaxmoeError, match=r"no statistics\.json"):
        merge([tmp_path / "a", tmp_path / "gone"], tmp_path / "m")
    with pytest.raises(JaxmoeError, match="exists"):
        merge([tmp_path / "a", Statistics.open(tmp_path / "a").folder], tmp_path / "a", force=True)
