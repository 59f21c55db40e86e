"""Architectures without a factored form: `plan` says so, and nothing is fitted or left behind before it is said."""

import json
import shutil
from pathlib import Path

import pytest
from planned import compress, make_plan
from program import call

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.families import exports
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods import get

KINDS = ["some_new_moe", "qwen3_vl_moe", "qwen3_5_moe", "bailing_moe"]
TEXT = ("--text", str(demo_texts()[0]))


def checkpoint(root: Path, kind: str) -> Path:
    folder = root / "source"
    shutil.copytree(demo_checkpoint(), folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": kind}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_plan_says_that_only_dense_can_be_written(tmp_path, kind):
    assert "factored" not in exports(kind)
    source = checkpoint(tmp_path, kind)
    done = call("plan", source, "-m", "svd", "-r", 0.3)
    assert done.returncode == 0
    assert "only dense can be written, with --export dense" in done.stdout.replace("\n", " ")
    assert json.loads(call("plan", source, "-m", "svd", "-r", 0.3, "--json").stdout)["exports"] == ["dense"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "-m", "svd", "-r", 0.3),
        ("compress", "-m", "mobe", "-r", 0.3, "--export", "factored", "--layers", "0:1"),
        ("compress", "-m", "svd", "-r", 0.3, *TEXT),
        ("compress", "-m", "svd", "-r", 0.3, "--sequential", *TEXT),
        ("compress", "-m", "frequency+svd", "-r", 0.4, *TEXT),
        ("compare", "--methods", "svd", "--ratios", 0.3, "--calibration-text", *TEXT[1:], *TEXT),
        ("compare", "--methods", "frequency,frequency+mobe", "--ratios", 0.3, "--calibration-text", *TEXT[1:], *TEXT),
    ],
)
def test_refused_before_anything_runs(tmp_path, arguments):
    source = checkpoint(tmp_path, "bailing_moe")
    command, *options = arguments
    done = call(command, source, tmp_path / "out", *options)
    assert done.returncode == 1
    assert "'bailing_moe' cannot be exported with factored experts" in done.stderr
    assert "--export dense" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refused_in_python_too(tmp_path):
    opened = Checkpoint.open(checkpoint(tmp_path, "some_new_moe"))
    method = get("svd")
    plan = make_plan(opened, method, method.settings(), ratio=0.3)
    with pytest.raises(JaxmoeError, match="export it dense"):
        compress(opened, tmp_path / "out", plan)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
