"""Values of options that no run can use get one short message, before anything is written."""

import pytest
from program import call

from jaxmoe.data import demo_checkpoint, demo_texts

COMPRESS = ("compress", demo_checkpoint(), "out", "--method", "svd", "--ratio", "0.4")
RECOVER = ("recover", demo_checkpoint(), "out", "--text", demo_texts()[0])
EVALUATE = ("evaluate", demo_checkpoint(), "--text", demo_texts()[0], "--length", "32")


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words):
    done = call(*words)
    assert len(done.stderr) < 1_500
    return done


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999999", "nan", "1.5", "x"])
@pytest.mark.parametrize("words", [COMPRESS, RECOVER])
def test_seeds(tmp_path, words, seed):
    done = run(*words, "--seed", seed)
    assert done.returncode == 2
    assert "--seed" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*COMPRESS[:4], "x" * 5_000, *COMPRESS[5:]), "(5"),
        (("inspect", "x" * 5_000), "(5"),
        ((*COMPRESS, "--set", f"{'x' * 5_000}=1"), "give NAME=VALUE"),
        ((*COMPRESS, "--layers", "9" * 5_000), "give FIRST:END"),
        ((*RECOVER, "--steps", 10**23), "at most"),
        ((*RECOVER, "--save-every", 0), "give at least 1"),
        ((*RECOVER, "--keep", -1), "give at least 1"),
        *(
            ((*RECOVER, f"--{name.replace('_', '-')}", value), f"error: {name} {value}: give a")
            for name in ("learning_rate", "clip", "temperature", "weight_decay")
            for value in ("1e+23", "inf", "nan", "-1.0")
        ),
        ((*RECOVER, "--loss", "next_token=1e39"), "give a positive weight, at most"),
        ((*EVALUATE, "--generate", 10**23), "tokens to generate"),
    ],
    ids=lambda given: str(given)[-40:],
)
def test_values(tmp_path, words, said):
    done = run(*words)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        (*COMPRESS, "--export", "x" * 5_000),
        (*COMPRESS, f"--{'x' * 5_000}"),
        (f"--{'x' * 5_000}", *COMPRESS),
        ("x" * 5_000,),
        ("inspect", demo_checkpoint(), "x" * 5_000),
    ],
    ids=lambda words: str(max(words, key=lambda word: len(str(word))))[:6],
)
def test_errors_of_usage_are_short(words):
    done = run(*words)
    assert done.returncode == 2
    assert "letters" in done.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("\n1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def (", "SyntaxError"),
        ("import jaxmoe\njaxmoe.nothing", "AttributeError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("raise BaseException('own')", "BaseException: own"),
    ],
)
def test_imported_modules_that_raise(tmp_path, code, said):
    (tmp_path / "own.py").write_text(code)
    done = run("--import", "own.py", "inspect", demo_checkpoint())
    assert done.returncode == 1
    assert done.stderr.startswith("error: --import own.py: ")
    assert said in done.stderr
