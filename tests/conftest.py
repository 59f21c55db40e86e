"""What holds for all tests: no hub, no accelerator, no user's cache, and compiled programs go before they are many."""

import os
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

# Read when the libraries are imported; the last is the folder that transformers copies the code of checkpoints to.
os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_MODULES_CACHE": (CODE := TemporaryDirectory(prefix="jaxmoe-tests-")).name}

# Beside what JAX leaves out when it compiles in a hurry, this version of XLA can leave out fusions through MLIR, which
# take two thirds of the time. Processes that tests start inherit both.
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1" and version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

import jax
import pytest
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parent.parent / "jaxmoe"

# Before anything imports them. PyTorch's compiler cannot look through the checks, and knows no arrays of JAX.
ROOMS = [f"jaxmoe.{path.stem}" for path in PACKAGE.iterdir() if path.stem not in ("torch", "__init__", "__main__")]
install_import_hook(ROOMS, "shapes.checked")

collect_ignore = [
    "golden",
    "outside",
    "checkpoint/families/own_classes.py",
    "checkpoint/families/own_family.py",
    "compression/methods_from_outside.py",
]
"""Where no tests are: code of older checkpoints, and files that register something if they are imported."""

MAPPINGS = 20_000
"""Of a process's memory. Every compiled program adds some, Linux allows 65,530, and XLA ends the process beyond."""


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forget all compiled programs where they have become many; those still needed come from the cache on disk."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
