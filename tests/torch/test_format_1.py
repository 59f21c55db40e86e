"""Checkpoints of format 1, every kind of term, as earlier versions wrote them: they load everywhere and answer alike.

`golden/format_1/README.md` says how they were made; the logits are those of PyTorch with the code of that time.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from jaxmoe import StoredModel
from jaxmoe.checkpoint.factored_format import factored_config, read_record
from jaxmoe.export.dense import densify
from jaxmoe.export.remote_code import remote_code
from jaxmoe.factors.registry import KINDS
from jaxmoe.model import forward
from jaxmoe.torch import register

torch.set_num_threads(1)
GOLDEN = Path(__file__).parents[1] / "golden" / "format_1"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
TOKENS = EXPECTED.pop("tokens")


def close(name: str, logits) -> bool:
    expected = EXPECTED[name].numpy()
    return float(np.linalg.norm(np.asarray(logits) - expected)) < 1e-5 * float(np.linalg.norm(expected))


def answers(folder: Path, **options) -> tuple[type, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return type(model), model(TOKENS, use_cache=False).logits


def test_every_term_of_format_1_is_there():
    terms = {"dense", "low_rank", "shared_basis", "grouped", "shared", "hashed", "sparse", "merged"}
    assert terms | {"masked", "compressed_experts"} == EXPECTED.keys()
    assert terms <= KINDS.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_loads_in_jax(name):
    model = StoredModel(GOLDEN / name)
    assert close(name, jax.jit(forward, static_argnums=2)(jnp.asarray(TOKENS.numpy()), model.parameters(), model.spec))


@pytest.mark.parametrize("name", EXPECTED)
def test_loads_in_pytorch_with_its_own_code(name, tmp_path, monkeypatch):
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    shutil.copytree(GOLDEN / "code", folder, dirs_exist_ok=True)
    kind, logits = answers(folder, trust_remote_code=True)
    assert kind.__module__.startswith("transformers_modules.")
    assert close(name, logits)


@pytest.mark.parametrize("name", EXPECTED)
def test_loads_in_pytorch_with_the_installed_package(name):
    register()
    kind, logits = answers(GOLDEN / name)
    assert kind.__module__ == "jaxmoe.torch.registration"
    assert close(name, logits)


def test_its_code_refuses_format_2(tmp_path, monkeypatch):
    """A checkpoint of this version, and the code of the last version that knew format 1 alone."""
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    folder = shutil.copytree(GOLDEN / "low_rank", tmp_path / "low_rank")
    shutil.copytree(GOLDEN / "code", folder, dirs_exist_ok=True)
    original, modules = read_record(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(factored_config(original, modules)))
    with pytest.raises(
        ValueError, match="has jaxmoe's format 2, and this code reads up to 1: pip install --upgrade jaxmoe"
    ):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for name, text in remote_code(factored_config(original, modules)).items():
        (folder / name).write_text(text)
    assert close("low_rank", answers(folder, trust_remote_code=True)[1])


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - {"masked", "compressed_experts"}))
def test_becomes_dense(name, tmp_path):
    densify(GOLDEN / name, tmp_path / "dense")
    kind, logits = answers(tmp_path / "dense")
    assert kind.__module__.startswith("transformers.models.")
    assert close(name, logits)
