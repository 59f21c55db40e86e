"""What the package as a whole promises: a light import, documented names, complete wheels, one version."""

import importlib.metadata
import inspect
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hatchling.builders.wheel import WheelBuilder
from jaxtyping import TypeCheckError
from program import checksums
from program import jaxmoe as program
from two_layers import short_demo

import jaxmoe
from jaxmoe.data import demo_texts
from jaxmoe.solvers.merging import ties

ROOT = Path(__file__).parents[1]


def test_import_is_light():
    code = "import sys, jaxmoe; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "jaxmoe" in loaded
    assert not loaded & {"torch", "transformers", "tokenizers", "matplotlib", "safetensors", "huggingface_hub", "jax"}


def test_command_line_comes_before_the_libraries():
    """`jaxmoe.cli` tells OpenBLAS how many threads to use, which is too late once numpy or JAX has loaded it."""
    code = "import sys, os, jaxmoe.cli; print(os.environ['OPENBLAS_NUM_THREADS'], *sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    threads, *loaded = done.stdout.split()
    assert threads == "1"
    assert not set(loaded) & {"numpy", "scipy", "jax", "jaxlib"}


def test_public_names_are_documented():
    for name in jaxmoe.__all__:
        thing = getattr(jaxmoe, name)
        if inspect.ismodule(thing) or callable(thing):
            assert (inspect.getdoc(thing) or "").strip(), f"jaxmoe.{name} has no docstring"


def test_the_door_is_made_of_functions():
    """Packages are named otherwise: once imported, one of the same name would stand in the place of a function."""
    code = (
        "import jaxmoe, jaxmoe.compression.run, jaxmoe.calibration.checkpoint, jaxmoe.evaluation, jaxmoe.comparison,"
        " jaxmoe.recovery.recover, inspect\n"
        "names = 'plan compress calibrate evaluate compare recover inspect'.split()\n"
        "assert all(inspect.isfunction(getattr(jaxmoe, name)) for name in names)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_old_names_work_once_more_and_name_the_new(tmp_path):
    svd, source = jaxmoe.methods.get("svd"), jaxmoe.Checkpoint.open(short_demo())
    with pytest.warns(DeprecationWarning, match=r"jaxmoe.make_plan is deprecated, use jaxmoe.plan"):
        plan = jaxmoe.make_plan(source, svd, svd.settings(), ratio=0.5)
    assert plan.summary() == jaxmoe.plan(short_demo(), "svd", ratio=0.5).as_json()
    jaxmoe.compress(source, tmp_path / "old", plan, seed=1)
    jaxmoe.compress(short_demo(), tmp_path / "new", "svd", ratio=0.5, seed=1)
    assert checksums(tmp_path / "old") == checksums(tmp_path / "new")
    options = {"sequences": 1, "length": 32}
    with pytest.warns(DeprecationWarning, match="use jaxmoe.calibrate"):
        old = jaxmoe.calibrate_checkpoint(short_demo(), demo_texts()[:1], tmp_path / "statistics", **options)
    assert old.domains == ("code",)
    with pytest.warns(DeprecationWarning, match="use jaxmoe.evaluate"):
        found = jaxmoe.evaluate_checkpoint(short_demo(), demo_texts()[:1], generate=0, **options)
    again = jaxmoe.evaluate(short_demo(), text=demo_texts()[0], generate=0, **options)
    assert found.texts == again.texts
    with pytest.warns(DeprecationWarning, match="use jaxmoe.compare with the names of methods"):
        assert jaxmoe.Contender(method=svd, settings=svd.settings()).name == "svd"
    with pytest.raises(AttributeError, match="no attribute 'make_plans'"):
        _ = jaxmoe.make_plans


def test_one_version():
    assert importlib.metadata.version("jaxmoe") == jaxmoe.__version__
    assert program("--version").stdout.split() == ["jaxmoe", jaxmoe.__version__]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names and sizes of the files in the wheel."""
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def test_wheel_holds_the_data_byte_for_byte(wheel):
    data = [
        path for path in (ROOT / "jaxmoe" / "data").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {"model.safetensors", "tokenizer.json", "SOURCES.md", "code.txt"} <= {path.name for path in data}
    for path in data:
        assert wheel.get(str(path.relative_to(ROOT))) == path.stat().st_size, f"{path.name} is not in the wheel"


def test_wheel_holds_all_code_and_nothing_else(wheel):
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxmoe").rglob("*.py")}
    assert code <= set(wheel)
    assert not [name for name in wheel if not name.startswith(("jaxmoe/", "jaxmoe-"))]


def test_bundled_files_name_no_machine():
    """The data are copies of files that were made elsewhere: no path of that machine may have come along."""
    for path in (ROOT / "jaxmoe" / "data").rglob("*"):
        if path.suffix in (".md", ".json") and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            assert not [word for word in ("/home/", "/root/", "/tmp/", "/work/") if word in text], path


def test_shapes_are_checked_in_the_tests_alone():
    with pytest.raises(TypeCheckError, match="weight"):
        ties(np.ones((2, 3), np.float32))
    code = "import sys, numpy as np; from jaxmoe.solvers.merging import ties; ties(np.ones((2, 3), np.float32))"
    done = subprocess.run([sys.executable, "-c", f"{code}; print(*sys.modules)"], capture_output=True, text=True)
    assert done.returncode == 0, "a program of the user's is not checked"
    assert "beartype" not in done.stdout.split()
