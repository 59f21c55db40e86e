"""A term of another package, and a method that stores it: planned, written, counted, run in JAX and in PyTorch."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from program import call
from tiny_models import save_tiny
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from jaxmoe import StoredModel, inspect, methods
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.factors.registry import KINDS
from jaxmoe.model import forward
from jaxmoe.torch import register
from jaxmoe.torch.runtime.term import TERMS

torch.set_num_threads(1)
TOKENS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a compressed checkpoint, and beside it the plan and its dense form."""
    root = tmp_path_factory.mktemp("outside")
    save_tiny("qwen3_moe", root / "source")
    own = ("--import", "outside.block_diagonal")
    size = ("--method", "blocks", "--ratio", "0.4", "--json")
    planned = call(*own, "plan", root / "source", *size)
    assert planned.returncode == 0, planned.stderr
    (root / "plan.json").write_text(planned.stdout)
    for line in (
        (*own, "compress", root / "source", root / "small", *size),
        (*own, "convert", root / "small", root / "dense", "--to", "dense"),
    ):
        done = call(*line)
        assert done.returncode == 0, done.stderr
    yield root / "small"
    # Other tests of the same process know what comes with jaxmoe, and no more.
    methods.METHODS.pop("blocks")
    for registry in (KINDS, TERMS):
        registry.pop("block_diagonal", None)
    for module in ("outside.block_diagonal", "outside.block_diagonal_twin"):
        sys.modules.pop(module, None)


def logits(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return type(model).__module__, model(TOKENS, use_cache=False).logits.numpy()


def close(ours, theirs) -> bool:
    return np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_runs_in_jax_and_in_pytorch(folder, monkeypatch):
    where, expected = logits(folder.parent / "dense")
    assert where.startswith("transformers.models.")
    assert not close(expected, logits(folder.parent / "source")[1])
    model = StoredModel(folder)
    assert close(
        np.asarray(jax.jit(forward, static_argnums=2)(jnp.asarray(TOKENS.numpy()), model.parameters(), model.spec)),
        expected,
    )
    register()
    where, found = logits(folder)
    assert where == "jaxmoe.torch.registration"
    assert close(found, expected)
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    where, found = logits(folder, trust_remote_code=True)
    assert where.startswith("transformers_modules.")
    assert close(found, expected)


def test_the_twin_travels_along(folder):
    text = (folder / "modeling_jaxmoe.py").read_text()
    assert '@register("block_diagonal")\nclass BlockDiagonalTerm(Term):' in text
    assert "class LowRankTerm(Term):" in text
    assert "class DenseTerm" not in text
    assert "import jaxmoe" not in text
    assert "from jaxmoe" not in text
    line = [sys.executable, "-m", "ruff", "check", "--config", "pyproject.toml", "--no-cache", str(folder)]
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0


def test_is_planned_and_counted(folder):
    plan = json.loads((folder.parent / "plan.json").read_text())
    kinds = [term["kind"] for term in plan["layers"][0]["projections"]["gate"]["terms"]]
    assert kinds == ["block_diagonal", "low_rank"]
    opened = CompressedCheckpoint.open(folder)
    assert opened.count().numbers == sum(entry.numbers for name, entry in opened.tensors.items() if ".experts." in name)
    assert opened.parameters == plan["parameters"]["after"]
    assert inspect(folder)["layers"][0]["terms"]["down"][0] == {"kind": "block_diagonal", "blocks": 4}


def test_its_work_is_its_own(folder):
    opened = CompressedCheckpoint.open(folder)
    layer = opened.layer(opened.modules[0])
    blocks, factors = layer.terms["down"]
    _, out, in_ = blocks.shape
    assert blocks.work(2) == (2 * out * in_ / 4, 2 * 2 * out * in_ / 4)
    every = [term for terms in layer.terms.values() for term in terms]
    assert layer.work(2).operations == sum(term.work(2).operations for term in every)
    assert factors.work(2).numbers == 2 * factors.rank * (out + in_)
