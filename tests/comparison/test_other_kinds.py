"""Recipes, slim checkpoints and fewer running experts as cells beside all others, and equal to single runs."""

import json
import shlex
from pathlib import Path

import pytest
from program import call, checksums
from small_comparison import ASKED
from two_layers import two_layers

from jaxmoe.comparison import compare, run
from jaxmoe.report.comparison import comparison_markdown
from jaxmoe.report.records import Requested


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    source = two_layers(folder / "source")
    chosen = {"compressed_experts:steps": 20, "nystrom:multiple": 1}
    options = {**ASKED, "ratios": [0.5], "main_experts": [1], "keep": True, "set": chosen, "baselines": "reap"}
    names = "compressed_experts, prune:reap+svd, nystrom"
    with pytest.MonkeyPatch.context() as changed:
        # Compiling again takes seconds.
        changed.setattr(run.jax, "clear_caches", lambda: None)
        return source, folder / "report", compare(source, folder / "report", names, **options)


def row(result, method):
    (found,) = (row for row in result.rows if row.method == method)
    return found


def test_every_kind_can_be_carried_out(compared):
    result = compared[-1]
    assert [row.method for row in result.rows] == [
        *("original", "reap", "compressed_experts", "reap+svd", "nystrom"),
    ]
    assert all(row.reason is None for row in result.rows)


def test_sizes_are_told_apart(compared):
    result = compared[-1]
    skipping = row(result, "compressed_experts")
    assert skipping.requested == Requested(main_experts=1)
    assert skipping.measured.achieved["experts"] < 0
    assert skipping.measured.error is None
    assert skipping.measured.operations_per_token < 0.4 * row(result, "original").measured.operations_per_token
    for method in ("reap+svd", "reap", "nystrom"):
        assert row(result, method).requested == Requested(ratio=0.5, of="experts")
        assert 0.5 <= row(result, method).measured.removed["parameters"]["experts"] < 0.501
    header, _, *lines = comparison_markdown(result).split("\n\n")[0].splitlines()
    assert header.endswith("| 50% of experts in parameters | 1 expert runs |")
    assert len(lines) == 4


def test_the_page_shows_them(compared):
    _, report, _ = compared
    page = (report / "index.html").read_text()
    assert "compressed_experts improved, steps=20, 1 expert runs" in page
    assert "reap removed" in page


@pytest.mark.parametrize("method", ["reap+svd", "compressed_experts", "nystrom"])
def test_a_cell_equals_the_command_that_it_names(compared, tmp_path, method):
    _, _, result = compared
    (cell,) = (cell for cell in result.cells if cell.method == method)
    words = shlex.split(cell.command)
    assert words[:2] == ["jaxmoe", "compress"]
    made = Path(words[3])
    words[3] = str(tmp_path / "again")
    done = call(*words[1:], "--json")
    assert done.returncode == 0, done.stderr
    assert checksums(tmp_path / "again") == checksums(made)
    report = json.loads(done.stdout)
    assert report["achieved"] == cell.measured.achieved
    assert not list(tmp_path.glob("again.steps"))


def test_an_unknown_step_is_refused(compared, tmp_path):
    source, *_ = compared
    for name, message in (("svd+mobe", "svd stores factors"), ("reap+nothing", "unknown method 'nothing'")):
        done = call("compress", source, tmp_path / "out", "-m", name, "-r", 0.5, "--text", ASKED["text"][0])
        assert done.returncode == 1
        assert message in done.stderr
