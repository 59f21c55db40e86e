"""The same source, settings, statistics and seed give the same tensors as they did when the checksums were recorded.

The last bits of floating-point results belong to one kind of processor and one version of JAX: elsewhere
`scripts/same_bytes.py --against COMMIT` compares two versions of the code.
"""

import json
from pathlib import Path

import pytest
from runs import RUNS, Sources, digest, here

CHECKSUMS = json.loads(Path(__file__).with_name("checksums.json").read_text())
# Descents and many ranks take seconds of tracing each; every method has a run among the others.
SLOW = {
    "svd-spectral-dense",
    "svd-importance-paper",
    "mobe-seed",
    "mobe-dense",
    "rfid",
    "rfid-closed-form",
    "d2moe",
    "d2moe-ties",
    "frequency+camera+d2moe",
}


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


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS])
def test_same_bytes(recorded, sources, name):
    assert digest(sources.run(name)) == recorded[name], f"python scripts/same_bytes.py --against COMMIT {name}"
