"""What `compare` says to bad input: the offender and the mend, exit code 1, and nothing is written."""

import pytest
from program import call

from jaxmoe.data import demo_checkpoint, demo_texts

TEXT = ("--text", demo_texts()[0])
SVD = ("--methods", "svd", "--ratios", "0.4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "svd,best", "--ratios", "0.4", *TEXT), ["'best'", "d2moe", "mobe", "rfid", "svd"]),
        (("--methods", ",", "--ratios", "0.4", *TEXT), ["no methods", "svd"]),
        (("--methods", "svd", "--ratios", "0.4,1.2,0", *TEXT), ["1.2", "0", "between 0 and 1"]),
        (("--methods", "svd", "--ratios", "much", *TEXT), ["much", "0.2,0.4"]),
        (("--methods", "svd", "--ratios", "", *TEXT), ["no ratios"]),
        ((*SVD, "--text", "nowhere.txt"), ["nowhere.txt does not exist"]),
        ((*SVD, *TEXT, "--calibration-text", "nowhere.txt"), ["nowhere.txt does not exist"]),
        ((*SVD, *TEXT, "--seeds", "0"), ["0 seeds"]),
        ((*SVD, *TEXT, "--windows", "0"), ["0 windows"]),
        ((*SVD, *TEXT, "--set", "mobe:steps=3"), ["mobe:steps=3", "svd:improved"]),
        ((*SVD, *TEXT, "--set", "svd:steps=3"), ["steps=3", "svd"]),
        ((*SVD, *TEXT, "--set", "svd:paper:setting=x"), ["svd:paper", "svd:improved"]),
    ],
)
def test_said_before_anything_runs(tmp_path, arguments, words):
    done = call("compare", demo_checkpoint(), tmp_path / "report", *arguments)
    assert done.returncode == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "report").exists()


def test_folder_with_other_content(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = call("compare", demo_checkpoint(), tmp_path, *SVD, *TEXT)
    assert done.returncode == 1
    assert f"{tmp_path} holds something that `jaxmoe compare` did not write" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    done = call("compare", demo_checkpoint(), tmp_path / "thesis.txt", *SVD, *TEXT)
    assert done.returncode == 1
    assert "is a file" in done.stderr


def test_folder_of_another_checkpoint(tmp_path):
    (tmp_path / ".jaxmoe" / "records").mkdir(parents=True)
    (tmp_path / ".jaxmoe" / "comparison.json").write_text('{"source": "another"}')
    done = call("compare", demo_checkpoint(), tmp_path, *SVD, *TEXT)
    assert done.returncode == 1
    assert "compares another checkpoint" in done.stderr


@pytest.mark.parametrize("name", ["no_such_module", "no_such_file.py"])
def test_import_that_fails(tmp_path, name):
    done = call("--import", name, "compare", demo_checkpoint(), tmp_path / "report", *SVD, *TEXT)
    assert done.returncode == 1
    assert f"--import {name}: " in done.stderr
