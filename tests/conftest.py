"""What holds for all tests: no hub, no accelerator, and compiled programs are let go of before there are too many."""

import os
from pathlib import Path

# Read when the libraries are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}

import jax
import pytest

collect_ignore = ["golden"]
"""Checkpoints that earlier versions wrote: their code is no module of the tests."""

MAPPINGS = 20_000
"""Of a process's memory. Every compiled program adds some, Linux allows 65,530, and XLA ends the process beyond."""


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forget all compiled programs where they have become many; those still needed come from the cache on disk."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
