"""Training as a step of a recipe: the same numbers as `jaxmoe recover` gives, one report, and a run that resumes."""

import pytest
from program import checksums
from two_layers import short_demo

import jaxmoe
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.data import demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.report.events import TrainingStep

TEXT = {"text": demo_texts()[0], "sequences": 2, "length": 32}
FEW = {"recover.steps": 3, "recover.rows": 2, "recover.train": "norms"}


def run(folder, name="svd+recover", **options):
    return jaxmoe.compress(short_demo(), folder, name, ratio=0.5, set=FEW, **TEXT, **options)


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovered") / "small"
    return folder, run(folder)


def test_it_is_what_the_two_commands_do_one_after_the_other(recovered, tmp_path):
    folder, report = recovered
    jaxmoe.compress(short_demo(), tmp_path / "small", "svd", ratio=0.5, **TEXT)
    options = {"teacher": short_demo(), "train": ["norms"], "steps": 3, "rows": 2, "length": 32}
    alone = jaxmoe.recover(tmp_path / "small", tmp_path / "trained", text=TEXT["text"], **options)
    left_out = ("report.json", "README.md", "recipe.yaml")
    assert checksums(folder, left_out) == checksums(tmp_path / "trained", left_out)
    assert report.recovery["losses"] == alone.as_json()["losses"]


def test_its_report_is_that_of_the_recipe(recovered):
    folder, report = recovered
    assert (report.method, [step.method for step in report.steps]) == ("svd+recover", ["svd", "recover"])
    assert report.source == str(short_demo())
    assert report.achieved["experts"] >= 0.5
    assert report.bytes.after == report.stored.bytes == sum(entry.bytes for entry in read_tensors(folder).values())
    assert report.recovery["trained"]["sets"] == ["norms"]
    assert any("from before the training" in outcome.detail for outcome in report.outcomes)
    assert not list(folder.parent.glob("small.*"))
    card = (folder / "README.md").read_text()
    assert "# Compressed with jaxmoe: svd+recover" in card
    assert "## Recovery" in card


def test_a_stopped_training_resumes_to_the_same_bytes(recovered, tmp_path):
    def stop(event):
        if isinstance(event, TrainingStep) and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", on_event=stop)
    assert not (tmp_path / "stopped").exists()
    run(tmp_path / "stopped")
    left_out = ("report.json", "README.md", "recipe.yaml")
    assert checksums(tmp_path / "stopped", left_out) == checksums(recovered[0], left_out)


def test_a_pruned_model_is_trained_before_it_is_factored(tmp_path):
    report = run(tmp_path / "small", "reap+recover+svd")
    assert [step.method for step in report.steps] == ["reap", "recover", "svd"]
    assert 0.5 <= report.achieved["experts"] < 0.51
    assert report.export == "factored"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svd+recover", {"text": None}, "give --text"),
        ("svd+recover", {"set": {"recover.loss": "luck"}}, "loss 'luck': give some of"),
        ("svd+recover", {"set": {"recover.learning_rate": -1.0}}, "learning_rate -1.0: give a positive number"),
        ("svd+recover", {"layers": (0, 2)}, "--layers: svd\\+recover does not take that"),
        ("recover", {}, "recover trains what steps before it stored, and there is none"),
    ],
)
def test_refused_before_anything_runs(tmp_path, name, options, message):
    with pytest.raises(JaxmoeError, match=message):
        jaxmoe.compress(short_demo(), tmp_path / "out", name, ratio=0.5, **{**TEXT, **options})
    assert not list(tmp_path.iterdir())
