"""Methods of three kinds from a file outside of the package: planned, carried out, compared and called by name."""

import json
from pathlib import Path

import numpy as np
import plain_checkpoint
import pytest
from program import call
from two_layers import short_demo

import jaxmoe
from jaxmoe import methods
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.cli.arguments import import_module
from jaxmoe.comparison import run as comparison
from jaxmoe.data import demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.report.events import LayerDone

FILE = str(Path(__file__).with_name("methods_from_outside.py"))
NAMES = ("rows", "last", "half")


def forget():
    for name in NAMES:
        methods.METHODS.pop(name, None)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Register the methods for this file alone."""
    import_module(FILE)
    yield
    forget()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a checkpoint in float32, so that float16 saves half."""
    return plain_checkpoint.write(tmp_path_factory.mktemp("outside") / "source", dtype=np.float32)


def experts_of(folder):
    opened = CompressedCheckpoint.open(folder)
    return [opened.layer(module) for module in opened.modules]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("rows", {"ratio": 0.1}),
        ("last", {"ratio": 0.25}),
        ("half", {}),
        ("svd+half", {"ratio": 0.7, "unit": "bytes", "of": "touched"}),
        ("svd+half", {"ratio": 0.7, "unit": "bytes"}),
        pytest.param("svd+half", {"ratio": 0.4, "unit": "bytes", "of": "model"}, marks=pytest.mark.slow),
        ("svd+half", {"ratio": 0.6, "unit": "bytes", "of": "model", "targets": "experts,attention"}),
        ("last+half", {"ratio": 0.5, "unit": "bytes"}),
        ("last+svd+half+compressed_experts", {"ratio": 0.75, "unit": "bytes", "main_experts": 1}),
        pytest.param(
            "svd+compressed_experts", {"ratio": 0.5, "unit": "bytes", "main_experts": 1}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_plan_is_what_comes_out(source, tmp_path, name, asked):
    plan = jaxmoe.plan(source, name, **asked)
    report = jaxmoe.compress(source, tmp_path / "small", name, **asked)
    assert report.method == plan.method == name
    held = read_tensors(tmp_path / "small").values()
    assert sum(entry.bytes for entry in held) == report.bytes.after == plan.bytes.after
    assert sum(entry.numbers for entry in held) == report.parameters.after == plan.parameters.after
    assert [step.method for step in report.steps or ()] == (name.split("+") if "+" in name else [])
    assert not list(tmp_path.glob("small.*"))
    assert StoredModel(tmp_path / "small").decoder() is not None
    if "ratio" in asked:
        of = asked.get("of", "experts")
        assert asked["ratio"] <= plan.achieved[of] < asked["ratio"] + 0.15
        assert report.requested.unit == asked.get("unit", "parameters")


def test_a_budget_in_bytes_is_spent_exactly_behind_the_last_step(source):
    """Ranks are counted in the bytes that they take once they are quantised: twice as many fit."""
    asked = {"ratio": 0.7, "unit": "bytes"}
    plain, both = (jaxmoe.plan(source, name, **asked) for name in ("svd", "svd+half"))
    numbers = [sum(p.parameters for own in plan.layers for p in own.projections.values()) for plan in (plain, both)]
    assert numbers[1] > 1.8 * numbers[0]
    experts = 2 * 4 * 3 * 16 * 8 * 4
    stored = experts * (1 - both.achieved["experts"])
    # One more rank of the cheapest target would be too much: 24 numbers of two bytes.
    assert 0.3 * experts - 48 < stored <= 0.3 * experts


def test_quantising_joins_the_pass_of_what_it_quantises(source, tmp_path):
    seen = []
    jaxmoe.compress(source, tmp_path / "plain", "svd", ratio=0.4, unit="bytes")
    jaxmoe.compress(source, tmp_path / "both", "svd+half", ratio=0.7, unit="bytes", on_event=seen.append)
    assert [event.layer for event in seen if isinstance(event, LayerDone)] == [0, 1]
    for plain, half in zip(experts_of(tmp_path / "plain"), experts_of(tmp_path / "both"), strict=True):
        for name, array in plain.tensors().items():
            found = half.tensors()[name]
            np.testing.assert_array_equal(found, array.astype(found.dtype))
            assert found.dtype == (np.float16 if array.dtype == np.float32 else array.dtype)


def test_a_factored_checkpoint_is_quantised_as_it_is(source, tmp_path):
    jaxmoe.compress(source, tmp_path / "both", "svd+half", ratio=0.7, unit="bytes")
    jaxmoe.compress(source, tmp_path / "plain", "svd", ratio=0.4, unit="bytes")
    jaxmoe.compress(tmp_path / "plain", tmp_path / "later", "half")
    once, twice = (sorted(read_tensors(tmp_path / name)) for name in ("both", "later"))
    assert once == twice
    for one, other in zip(experts_of(tmp_path / "both"), experts_of(tmp_path / "later"), strict=True):
        for name, array in one.tensors().items():
            np.testing.assert_array_equal(array, other.tensors()[name])


def test_layers_of_several_runs_make_one_checkpoint(source, tmp_path):
    whole = jaxmoe.compress(source, tmp_path / "whole", "svd+half", ratio=0.7, unit="bytes")
    first = jaxmoe.compress(source, tmp_path / "parts", "svd+half", ratio=0.7, unit="bytes", layers=(0, 1))
    assert (first.complete, first.missing_layers) == (False, [1])
    rest = jaxmoe.compress(source, tmp_path / "parts", "svd+half", ratio=0.7, unit="bytes", layers=(1, 2))
    assert rest.complete
    assert rest.achieved == whole.achieved
    assert [step.method for step in rest.steps] == ["svd", "half"]


BAD = {
    "half+svd": "half stores factors, on which svd cannot work; the order is svd\\+half",
    "svd+half+last": "svd stores factors, on which last cannot work; the order is last\\+svd\\+half",
    "svd+half+half": "half stands twice.*the order is svd\\+half",
    "svd+rows": "svd stores factors, on which rows cannot work",
    "recover+last": "recover trains what steps before it stored, and there is none; the order is last\\+recover",
}


@pytest.mark.parametrize("name", BAD)
def test_orders_that_make_no_sense(source, name):
    with pytest.raises(JaxmoeError, match=BAD[name]):
        jaxmoe.plan(source, name, ratio=0.4)


def test_sizes_that_no_step_takes(source):
    with pytest.raises(JaxmoeError, match=r"--ratio: half takes no ratio; methods that store fewer numbers are .*rows"):
        jaxmoe.plan(source, "half", ratio=0.5)
    with pytest.raises(JaxmoeError, match=r"--main-experts goes with --method compressed_experts"):
        jaxmoe.plan(source, "svd+half", ratio=0.5, unit="bytes", main_experts=1)
    with pytest.raises(JaxmoeError, match=r"--unit parameters: svd\+half holds .* give --unit bytes"):
        jaxmoe.plan(source, "svd+half", ratio=0.5)
    with pytest.raises(JaxmoeError, match=r"give the fraction to remove"):
        jaxmoe.plan(source, "svd+half")
    with pytest.raises(JaxmoeError, match=r"unit 'bits': give parameters or bytes"):
        jaxmoe.plan(source, "svd+half", ratio=0.5, unit="bits")


def test_by_name_on_the_command_line(source, tmp_path):
    forget()
    done = call("--import", FILE, "plan", source, "-m", "last+half", "-r", 0.6, "--unit", "bytes", "--json")
    assert done.returncode == 0, done.stderr
    assert [step["method"] for step in json.loads(done.stdout)["steps"]] == ["last", "half"]
    done = call("compress", source, tmp_path / "small", "-m", "rows", "-r", 0.1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"][0]["projections"]["down"]["terms"][0]["kind"] == "low_rank"


def test_beside_all_others_in_a_comparison(tmp_path, monkeypatch):
    # Drawing and compiling again take seconds.
    monkeypatch.setattr(comparison, "page", lambda result: "")
    monkeypatch.setattr(comparison.jax, "clear_caches", lambda: None)
    words = (
        "--ratios",
        0.25,
        "--unit",
        "bytes",
        "--text",
        demo_texts()[0],
        "--windows",
        1,
        "--length",
        32,
        "--baselines",
        "svd",
    )
    done = call("compare", short_demo(), tmp_path / "report", "--methods", "rows,last,svd+half", *words, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = {row["method"]: row for row in result["rows"]}
    assert {"rows", "last", "svd+half"} <= rows.keys()
    assert all("reason" not in rows[name] for name in ("rows", "last", "svd+half"))
    commands = {cell["method"]: cell["command"] for cell in result["cells"]}
    assert commands["svd+half"].startswith("jaxmoe --import methods_from_outside compress ")
    assert not commands["svd"].startswith("jaxmoe --import")
