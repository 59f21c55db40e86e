"""`jaxmoe compare`: its cells equal single runs, what is finished stays, and a comparison grows."""

import csv
import json
import math
import shlex
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from msgspec.structs import replace
from program import ENVIRONMENT, call, command, jaxmoe
from small_comparison import ASKED, CALIBRATION, OPTIONS, RATIO, contenders

from jaxmoe.comparison import compare
from jaxmoe.comparison.cells import recipe_options
from jaxmoe.compression.recipe import find
from jaxmoe.data import demo_texts
from jaxmoe.report.comparison import label
from jaxmoe.report.comparison_records import Comparison

OWN = '''
"""Truncated SVD that never looks at what was calibrated."""
from jaxmoe import methods
from jaxmoe.methods.method import Evidence
from jaxmoe.methods.svd import SVD


def fit(weight, template, settings, *, evidence, key=None):
    return SVD.fit(weight, template, settings, evidence=Evidence(target=evidence.target), key=key)


methods.register(SVD._replace(name="own", summary="unweighted SVD", fit=fit))
'''


def times(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / ".jaxmoe" / "records").iterdir()}


def test_rows_say_what_the_cells_measured(compared):
    original, *others = compared.result.rows
    assert original.method == "original"
    assert [(row.method, row.setting) for row in others] == [
        ("svd", "paper"),
        ("svd", "improved"),
        ("frequency", "improved"),
        ("reap", "improved"),
        ("mobe", "paper"),
    ]
    original = original.measured
    for setting in ("paper", "improved"):
        row, cell = compared.measured("svd", setting), compared.cell("svd", setting).measured
        nats = np.array([text.nats_per_token for text in cell.evaluation.texts])
        before = np.log([original.perplexity[text.name] for text in cell.evaluation.texts])
        assert row.geometric_mean_perplexity == pytest.approx(np.exp(nats.mean()))
        assert row.nats_lost == pytest.approx((nats - before).mean())
        assert row.growth == pytest.approx(math.exp(row.nats_lost))
        assert row.worst.growth == pytest.approx(np.exp(np.max(nats - before)))
        assert 0 < row.kl_median < row.kl < row.kl_p99 < row.kl_p999
        assert 0 < row.top1_agreement < 1
        assert RATIO <= row.removed["parameters"]["experts"] == row.achieved["experts"] < RATIO + 0.02
        assert row.bits_per_weight["experts"] == pytest.approx(16 * (1 - row.removed["bytes"]["experts"]))
        assert row.loaded_bytes == row.bytes < original.bytes
        errors = [record.error for layer in cell.layers for record in layer.projections.values()]
        assert row.error == pytest.approx(np.mean(errors))
        assert row.operations_per_token < original.operations_per_token
    # What published SVD does not use, it is not given.
    assert compared.measured("svd", "paper").weighted_error is None
    assert compared.measured("svd", "improved").weighted_error > 0
    assert compared.measured("svd", "improved").kl < compared.measured("svd", "paper").kl


def test_a_size_out_of_reach_is_a_result(compared):
    row = compared.row("mobe", "paper")
    assert "out of reach" in row.reason
    assert row.measured is None
    assert row.commands[0].split()[:2] == ["jaxmoe", "compress"]
    assert row.reason in (compared.folder / "table.md").read_text()


def test_tables_hold_the_rows(compared):
    said = json.loads((compared.folder / "comparison.json").read_text())
    assert said == json.loads(json.dumps(compared.result.as_json()))
    assert Comparison.read(said) == compared.result
    lines = list(csv.DictReader((compared.folder / "table.csv").open()))
    assert [line["method"] for line in lines] == [label(row) for row in compared.result.rows]
    for line, row in zip(lines, compared.result.rows, strict=True):
        for key in ("geometric_mean_perplexity", "kl", "kl_p999", "error", "active_parameters", "seconds"):
            value = getattr(row.measured, key, None)
            assert line[key] == ("" if value is None else str(value))
        for name, value in getattr(row.measured, "perplexity", {}).items():
            assert float(line[f"perplexity_{name}"]) == value
    header, rule, *body = (compared.folder / "table.md").read_text().split("\n\n")[1].splitlines()
    assert len(body) == len(lines)
    assert {line.count("|") for line in (header, rule, *body)} == {header.count("|")}
    row = compared.measured("svd", "improved")
    assert f"| {row.geometric_mean_perplexity:.2f} |" in body[2]
    overview = (compared.folder / "table.md").read_text().split("\n\n")[0].splitlines()
    assert overview[0].endswith("| 80% of experts in parameters |")
    assert f"| svd improved | {row.geometric_mean_perplexity:.2f} (x{row.growth:.3f}; " in overview[3]
    assert overview[-1] == "| mobe paper, steps=5 | – |"


def test_a_cell_equals_single_runs(compared, tmp_path):
    cell = compared.cell("svd", "improved")
    program, name, source, _, *options = shlex.split(cell.command)
    assert (program, name, source) == ("jaxmoe", "compress", str(compared.source))
    done = call(name, source, tmp_path / "small", *options, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    cell = cell.as_json()
    for key in ("requested", "achieved", "removed", "bits_per_weight", "bytes", "allocation", "outcomes"):
        assert cell[key] == report[key]
    assert [layer["projections"] for layer in cell["layers"]] == [layer["projections"] for layer in report["layers"]]
    texts = [part for path in demo_texts()[:2] for part in ("--text", path)]
    done = call("evaluate", tmp_path / "small", *texts, "--sequences", 2, "--length", 64, "--generate", 0, "--json",
                  "--against", source)  # fmt: skip
    assert done.returncode == 0, done.stderr
    single = json.loads(done.stdout)
    for key in ("texts", "geometric_mean_perplexity", "kl", "kl_percentiles", "top1_agreement"):
        assert cell["evaluation"][key] == single[key]
    before = {text["name"]: text["perplexity"] for text in single["against"]["texts"]}
    assert compared.measured("original").perplexity == pytest.approx(before, rel=1e-6)


def test_what_is_finished_is_not_measured_again(compared, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    before = times(compared.folder)
    for name in ("run.make", "run.evaluate_windows", "run.walk", "run.spectra"):
        monkeypatch.setattr(f"jaxmoe.comparison.{name}", refuse)
    # Without matplotlib the tables are written all the same.
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    (compared.folder / "table.csv").unlink()
    again = compare(compared.source, compared.folder, contenders(), **ASKED)
    assert 'pip install "jaxmoe[plots]"' in again.no_page
    assert replace(again, no_page=None) == compared.result
    assert (compared.folder / "table.csv").exists()
    assert times(compared.folder) == before


def test_a_method_from_elsewhere_joins(compared, tmp_path):
    """On the command line, into a copy of what was there: its cells stay, and are in the new table too."""
    (tmp_path / "own.py").write_text(OWN)
    folder = shutil.copytree(compared.folder, tmp_path / "report")
    before = times(folder)
    run = ("--import", tmp_path / "own.py", "compare", compared.source, folder, "--methods", "own")
    done = jaxmoe(*run, *OPTIONS, *CALIBRATION, "--json")
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    *rows, last = Comparison.read(grown).rows
    assert last.method == "own"
    assert rows == compared.result.rows
    after = times(folder)
    assert len(after) == len(before) + 1
    assert {path: after[path] for path in before} == before
    (own,) = (cell for cell in grown["cells"] if cell["method"] == "own")
    assert own["command"].startswith(f"jaxmoe --import {tmp_path / 'own.py'} compress ")
    # Not weighing by what was seen costs weighted error and gains plain error.
    assert last.measured.weighted_error > compared.measured("svd", "improved").weighted_error
    assert last.measured.error < compared.measured("svd", "improved").error
    planned = jaxmoe("--import", tmp_path / "own.py", "plan", compared.source, "--method", "own", "--ratio", "0.4")
    assert planned.returncode == 0, planned.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on(compared, tmp_path):
    report = tmp_path / "report"
    run = ("compare", compared.source, report, "--methods", "svd", "--setting", "paper", *OPTIONS)
    run = tuple(x if x != RATIO else f"{RATIO},0.85" for x in run)
    process = subprocess.Popen(command(*run), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        begin = time.monotonic()
        while not (report / "table.csv").exists():
            assert process.poll() is None
            assert time.monotonic() - begin < 240
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = times(report)
    done = call(*run, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    after = times(report)
    assert {path: after[path] for path in before} == before
    assert [cell["ratio"] for cell in said["cells"]] == [RATIO, 0.85]
    for key in ("nats_per_token", "kl"):
        own, other = (
            [text[key] for text in cell["evaluation"]["texts"]]
            for cell in (said["cells"][0], compared.cell("svd", "paper").as_json())
        )
        # Compiled in another process, sums may round otherwise.
        assert own == pytest.approx(other, rel=1e-6)
    assert not list((report / "checkpoints").iterdir())


def test_changed_settings_are_new_contenders():
    assert recipe_options(find("mobe", setting="paper")) == ["--method", "mobe", "--setting", "paper"]
    names = {tuple(sorted(c.identity()["settings"].items())) for c in contenders()}
    assert len(names) == 2
