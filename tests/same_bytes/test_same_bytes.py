"""The same source, settings, statistics and seed give the same tensors as they did when the checksums were recorded.

The last bits of floating-point results belong to one kind of processor and one version of JAX: elsewhere
`scripts/same_bytes.py --against COMMIT` compares two versions of the code.
"""

import json
from pathlib import Path

import pytest
from runs import RUNS, Sources, digest, here

CHECKSUMS = json.loads(Path(__file__).with_name("checksums.json").read_text())


@pytest.fixture(scope="module")
def recorded() -> dict[str, str]:
    """The checksums of this platform."""
    platform = here()
    for known in CHECKSUMS:
        if known["platform"] == platform:
            return known["runs"]
    pytest.skip(f"no checksums were recorded for {platform}")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Sources:
    return Sources(tmp_path_factory.mktemp("runs"))


# The tests of `make test` are compiled in a hurry, which changes the last bits.
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_same_bytes(recorded, sources, name):
    assert digest(sources.run(name)) == recorded[name], f"python scripts/same_bytes.py --against COMMIT {name}"
