"""A shard that is truncated, replaced or removed under a run: one message that names it, and nothing is lost."""

import os
import shutil
import subprocess
import sys

import pytest
from planned import compress, make_plan
from program import ENVIRONMENT, checksums
from two_layers import short_demo

from jaxmoe import methods
from jaxmoe.calibration.checkpoint import calibrate
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.errors import JaxmoeError
from jaxmoe.evaluation import evaluate
from jaxmoe.report.events import Counted, LayerDone

SHARD = "model.safetensors"


@pytest.fixture
def source(tmp_path):
    return shutil.copytree(short_demo(), tmp_path / "source")


def truncate(path):
    os.truncate(path, path.stat().st_size // 3)


def replace(path):
    path.with_name("new").write_bytes(path.read_bytes()[::-1])
    path.with_name("new").replace(path)


def changing(source, change):
    """Return what changes the source when the first step of a run is done."""
    left = [change]

    def on_event(event):
        if left and isinstance(event, Counted):
            left.pop()(source / SHARD)

    return on_event


def run_svd(source, output, on_event=lambda event: None):
    checkpoint, recipe = Checkpoint.open(source), methods.get("svd")
    plan = make_plan(checkpoint, recipe, recipe.settings(), ratio=0.3)
    return compress(checkpoint, output, plan, on_event=on_event)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The checksums of what an undisturbed run makes."""
    output = tmp_path_factory.mktemp("quiet") / "output"
    run_svd(short_demo(), output)
    return checksums(output)


@pytest.mark.parametrize("change", [truncate, replace, lambda path: path.unlink()])
def test_compress_names_the_file_and_goes_on_once_it_is_back(source, change, quiet, tmp_path):
    whole = (source / SHARD).read_bytes()
    with pytest.raises(JaxmoeError, match=rf"{SHARD} (was changed while it was in use|does not exist)"):
        run_svd(source, tmp_path / "output", changing(source, change))
    assert not (tmp_path / "output").exists()
    (source / SHARD).write_bytes(whole)
    resumed = []
    run_svd(
        source,
        tmp_path / "output",
        lambda event: resumed.append(event.resumed if isinstance(event, LayerDone) else None),
    )
    assert resumed[0] is True
    assert checksums(tmp_path / "output") == quiet


def test_evaluate_and_calibrate_name_the_file(tmp_path):
    # Of four layers: the second is read while the first one runs.
    source = shutil.copytree(demo_checkpoint(), tmp_path / "source")
    text, whole = [demo_texts()[0]], (source / SHARD).read_bytes()
    with pytest.raises(JaxmoeError, match=f"{SHARD} was changed while it was in use"):
        evaluate(source, text=text, sequences=2, on_event=changing(source, truncate))
    (source / SHARD).write_bytes(whole)
    with pytest.raises(JaxmoeError, match=f"{SHARD} was changed while it was in use"):
        calibrate(source, tmp_path / "sums", text=text, sequences=2, on_event=changing(source, truncate))


def test_the_process_ends_with_a_message_and_no_signal(source):
    program = (
        "import os, sys; from jaxmoe.checkpoint.stored_model import StoredModel; model = StoredModel(sys.argv[1]);"
        "model.layer(0); os.truncate(sys.argv[2], 100_000); model.layer(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, source, source / SHARD],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "was changed while it was in use (it had" in done.stderr
