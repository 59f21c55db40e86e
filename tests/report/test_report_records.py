"""Records of plans and runs: their JSON is what earlier versions wrote, and reading it gives the same record again."""

import json

import msgspec
import pytest

from jaxmoe.errors import JaxmoeError
from jaxmoe.report import events
from jaxmoe.report.records import Change, Improvement, Projection, Report, Requested

SIZES = {
    "method": "svd",
    "settings": {"setting": "improved"},
    "requested": {"ratio": 0.4, "of": "experts"},
    "achieved": {"touched": 0.4, "experts": 0.4, "model": 0.3},
    "parameters": {"before": 10, "after": 7},
    "bytes": {"before": 20, "after": 14},
}
RUN = {
    "jaxmoe": "0.1.0",
    "source": "big",
    "output": "small",
    "command": "",
    "seed": 0,
    "export": "factored",
    "outcomes": [{"layer": None, "kind": "note", "target": None, "detail": "read from FP8"}],
    "calibration": None,
    "peak_bytes": 5,
    "layer_seconds": 1.5,
    "seconds": 2.0,
    "complete": True,
    "seal": "00",
}
STORED = {"terms": [{"target": "down", "kind": "low_rank", "rank": 3}], "ranks": [3], "parameters": 9, "kept": 0.5}
FITTED = {**STORED, "error": 0.2, "worst_error": 0.3, "worst_expert": 1, "weighted_error": None}
OF_FACTORS = {
    **SIZES,
    **RUN,
    "allocation": "uniform",
    "layers": [{"layer": 0, "projections": {"down": FITTED}, "seconds": 1.5, "losses": {"down": [0.5, 0.2]}}],
    "predicted_peak_bytes": 4,
    "missing_layers": [],
    "run": {"source": "abc"},
    "stored": {"parameters": 7, "bytes": 14},
}
OF_SKIPPED_EXPERTS = {
    **SIZES,
    **RUN,
    "requested": {"main_experts": 1},
    "calibration": {"sequential": False, "domains": {"code": 4}, "tokens": 4, "moments": "none"},
    "experts_per_token": {"before": 2, "after": 1},
    "layers": [
        {
            "layer": 0,
            "projections": {"down": STORED},
            "error": {"before": 0.3, "after": 0.2},
            "steps": 50,
            "losses": [0.3, 0.2],
            "importance": {"by_rank": [0.7, 0.3]},
            "never_auxiliary": [],
            "seconds": 1.0,
        }
    ],
}
EVENTS = [
    {"event": "layer", "done": 1, "total": 2, "layer": 0, "resumed": False, "seconds": 1.0, "projections": {}},
    {"event": "calibrated", "done": 1, "total": 2, "layer": 0},
    {"event": "forward", "done": 1, "total": 2, "model": "small"},
    {"event": "step", "done": 1, "total": 2, "step": 1, "loss": 0.5, "learning_rate": 0.1},
    {"event": "damaged", "reason": "a state is damaged", "instead": "going on from step 1"},
    {"event": "cell", "name": "svd", "done": 1, "total": 2, "reason": "out of reach"},
    {"event": "cell", "name": "svd", "done": 1, "total": 2, "perplexity": 3.0, "seconds": 1.0},
    {"event": "waiting", "layers": [3, 4]},
    {"event": "complete", "output": "small"},
]


@pytest.mark.parametrize("record", [OF_FACTORS, OF_SKIPPED_EXPERTS], ids=["factors", "skipped experts"])
def test_reports_of_every_kind_read_and_write_the_same_json(record):
    report = Report.read(json.loads(json.dumps(record)))
    assert report.as_json() == record
    assert Report.read(report.as_json()) == report


def test_what_a_newer_version_adds_is_left_out_of_account():
    assert Report.read({**OF_FACTORS, "mood": "good"}).as_json() == OF_FACTORS


def test_null_and_missing_are_told_apart():
    assert Projection.read(FITTED).weighted_error is None
    assert Projection.read(STORED).weighted_error is msgspec.UNSET


def test_the_unit_is_written_where_it_is_not_the_usual_one():
    assert Requested(ratio=0.4, of="experts", unit="bytes").as_json()["unit"] == "bytes"
    assert "unit" not in Requested(ratio=0.4, of="experts").as_json()


def test_what_is_no_report_is_named():
    with pytest.raises(JaxmoeError, match=r"no record of the kind Report .*\$.bytes.after"):
        Report.read({**OF_FACTORS, "bytes": {"before": 1, "after": "few"}})
    with pytest.raises(JaxmoeError, match="Report"):
        Report.read([])


@pytest.mark.parametrize("record", EVENTS, ids=lambda record: record["event"])
def test_events_read_and_write_the_same_json_and_a_line(record):
    event = events.read_event(record)
    assert event.as_json() == record
    assert str(event)
    assert "\n" not in str(event)


def test_an_unknown_event_is_named():
    with pytest.raises(JaxmoeError, match="no event 'flood': there are layer, "):
        events.read_event({"event": "flood"})


def test_lines_say_what_happened():
    done = {"done": 1, "total": 6, "layer": 3}
    layer = events.LayerDone(**done, resumed=False, seconds=2.0, projections={"down": Projection.read(FITTED)})
    assert str(layer) == "layer 3 (1 of 6, 2.0 s): relative error down 0.2000"
    error = Improvement(before=0.3, after=0.2)
    learned = events.LayerDone(**done, resumed=False, seconds=2.0, projections={}, error=error)
    assert str(learned) == "layer 3 (1 of 6, 2.0 s): error of its output 0.3000 -> 0.2000"
    assert str(events.Waiting(layers=[3, 4])).endswith("layers 3-4 are still to come from other runs")


def test_steps_of_something_larger_do_not_say_that_they_are_complete():
    heard = []
    on_event = events.without_complete(heard.append)
    for record in EVENTS:
        on_event(events.read_event(record))
    assert len(heard) == len(EVENTS) - 1


def test_records_are_compared_by_what_they_say():
    assert Change(before=2, after=1) == Change.read({"before": 2, "after": 1})
