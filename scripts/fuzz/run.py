"""Fuzz one reader of jaxmoe, guided by coverage: `python scripts/fuzz/run.py TARGET [--seconds N] [--corpus FOLDER]`.

Inputs that raise anything but `JaxmoeError`, take longer than ten seconds or more than 4 GB are written to the corpus's
folder as `crash-*`, `timeout-*` or `oom-*`; `run.py TARGET --replay FILE` shows what one of them does.
"""

import argparse
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=("safetensors", "config", "record"))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"))
    parser.add_argument("--replay", type=Path)
    given = parser.parse_args()
    # Not imported by its name: type checkers and the tests do without it.
    atheris: Any = import_module("atheris")
    # numpy and JAX are not ours to follow, and would take minutes to instrument.
    with atheris.instrument_imports(include=["jaxmoe"]):
        targets = import_module("targets")
    target = targets.TARGETS[given.target]()
    if given.replay is not None:
        target(given.replay.read_bytes())
        return
    corpus = given.corpus / given.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number:03d}").write_bytes(seed)

    def once(data: bytes) -> None:
        with suppress(targets.JaxmoeError):
            target(data)

    options = (f"-max_total_time={given.seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=4096")
    atheris.Setup(
        [sys.argv[0], *options, f"-artifact_prefix={given.corpus}/", "-print_final_stats=1", str(corpus)], once
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
