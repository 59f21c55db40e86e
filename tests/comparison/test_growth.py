"""Which cells a further run measures, and which it finds: what they depend on decides, with the measuring left out."""

import pytest
from small_comparison import ASKED

from jaxmoe.comparison import compare, run
from jaxmoe.compression.recipe import find
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError

UNCALIBRATED = {**ASKED, "calibration_text": None}


@pytest.fixture
def measured(monkeypatch):
    """The names of the cells that were measured since the list was emptied; all of them are out of reach."""
    names = []

    def measure(self, cell, output, command, calibration):
        names.append(cell.name)
        return "out of reach"

    monkeypatch.setattr(run._Run, "_measured", measure)
    monkeypatch.setattr(run, "spectra", lambda checkpoint: [])
    monkeypatch.setattr(run, "page", lambda result: "")
    return names


def test_only_what_is_new_is_measured(measured, tmp_path):
    """Ratios, methods, seeds, calibration and texts, one after the other into one folder."""
    both = [find("svd", setting="paper"), find("svd")]

    def grown(contenders, **asked):
        measured.clear()
        result = compare(demo_checkpoint(), tmp_path / "report", contenders, **asked)
        return list(measured), [cell.name for cell in result.cells]

    paper, improved = (f"svd-{setting}-0.8-experts-seed0" for setting in ("paper", "improved"))
    assert grown(both, **UNCALIBRATED) == ([paper, improved], [paper, improved])
    assert grown(both, **UNCALIBRATED) == ([], [paper, improved])
    new, all_of_them = grown(both[:1], **{**UNCALIBRATED, "ratios": [0.8, 0.5]})
    assert new == ["svd-paper-0.5-experts-seed0"]
    assert all_of_them == [paper, improved, *new]
    new, all_of_them = grown([find("mobe"), *both], **UNCALIBRATED)
    assert new == ["mobe-improved-0.8-experts-seed0"]
    assert len(all_of_them) == 4
    assert grown(both, **{**UNCALIBRATED, "seeds": 2})[0] == [
        name.replace("seed0", "seed1") for name in (paper, improved)
    ]
    # Other windows are another question, and the answers to the old one are still there.
    assert grown(both, **{**UNCALIBRATED, "windows": 1}) == ([paper, improved], [paper, improved])
    assert grown(both, **UNCALIBRATED)[0] == []
    # Cells as published did without calibration, and need not be measured again for its sake.
    new, all_of_them = grown(both, **ASKED)
    assert new == [*(f"{name}-improved-0.8-experts-seed0" for name in ("frequency", "reap")), improved]
    assert paper in all_of_them
    assert all_of_them.count(improved) == 1


def test_two_runs_at_once(measured, tmp_path, monkeypatch):
    def again(self, cell, output, command, calibration):
        with pytest.raises(JaxmoeError, match="another run is comparing"):
            compare(demo_checkpoint(), tmp_path, ["svd"], **UNCALIBRATED)
        return "out of reach"

    monkeypatch.setattr(run._Run, "_measured", again)
    arguments = {**UNCALIBRATED, "text": demo_texts()[:1], "windows": 1}
    assert compare(demo_checkpoint(), tmp_path, ["svd"], **arguments).cells
