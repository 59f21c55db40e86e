"""Compressed Experts in PyTorch: written by jaxmoe, loaded by transformers, logits as JAX computes them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from program import call
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY, load_tiny, save_tiny
from transformers import AutoModelForCausalLM

from jaxmoe import StoredModel, compress
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.dense import densify
from jaxmoe.model import forward

torch.set_num_threads(1)
TOKENS = torch.randint(3, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(7))
# Softmax, normalised or not; of the chosen, with biases, gate and up interleaved; sigmoid in groups; one by one.
FAMILIES = {
    "qwen3_moe": {"num_experts_per_tok": 4},
    "olmoe": {"num_experts_per_tok": 4},
    "gpt_oss": {"num_experts_per_tok": 3},
    "deepseek_v3": {"num_experts_per_tok": 4},
    "phimoe": {},
}


def write(family: str, root: Path, renorm: str = "none") -> Path:
    """Write a tiny model of which one or two experts run, with random vectors in place of the others."""
    save_tiny(family, root / "model", **FAMILIES[family])
    top_k = FAMILIES[family].get("num_experts_per_tok", 2)
    options = {"main_experts": max(1, top_k // 2), "set": {"renorm": renorm}}
    compress(root / "model", root / "small", "compressed_experts", **options)
    randomize(root / "small")
    return root / "small"


def randomize(folder: Path) -> None:
    random = torch.Generator().manual_seed(1)
    found = 0
    for path in folder.glob("model-layer*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if ".auxiliary." in name:
                tensors[name] = 1 + 0.5 * torch.randn(tensors[name].shape, generator=random)
                found += 1
        save_file(tensors, path, metadata={"format": "pt"})
    assert found


def in_jax(folder: Path) -> np.ndarray:
    model = StoredModel(folder)
    return np.asarray(jax.jit(forward, static_argnums=2)(jnp.asarray(TOKENS.numpy()), model.parameters(), model.spec))


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.float().numpy()


def distance(ours, theirs) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_jax(family, tmp_path):
    small = write(family, tmp_path, "main" if family == "deepseek_v3" else "none")
    model = load(small, dtype=torch.float32)
    found = logits(model)
    assert distance(found, in_jax(small)) < 1e-4
    assert distance(found, logits(load_tiny(tmp_path / "model"))) > 0.02, "the vectors must move the logits"
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert model.generate(TOKENS, **options).shape == (2, 25)


def test_loads_in_bfloat16_with_vectors_in_float32(tmp_path):
    small = write("qwen3_moe", tmp_path)
    model = load(small, dtype=torch.bfloat16)
    kept = {name: own.dtype for name, own in model.named_parameters() if ".auxiliary." in name}
    assert len(kept) == 3 * 2
    assert set(kept.values()) == {torch.float32}
    # A token near the border between two experts may change sides in bfloat16.
    assert distance(logits(model), in_jax(small)) < 0.3
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    stored = {name: entry for name, entry in read_tensors(small).items() if ".auxiliary." in name}
    for name, entry in stored.items():
        np.testing.assert_array_equal(again[name].numpy(), entry.read())


def test_stores_the_vectors_and_nothing_else(tmp_path):
    small = write("qwen3_moe", tmp_path)
    before, after = (sum(own.numbers for own in read_tensors(tmp_path / name).values()) for name in ("model", "small"))
    assert after - before == 2 * EXPERTS * (2 * HIDDEN + INTERMEDIATE)
    vectors = {name: own for name, own in read_tensors(small).items() if ".auxiliary." in name}
    assert {own.dtype for own in vectors.values()} == {"F32"}
    assert {name.split(".")[-1]: own.shape for name, own in vectors.items()} == {
        "gate": (EXPERTS, HIDDEN),
        "up": (EXPERTS, HIDDEN),
        "down": (EXPERTS, INTERMEDIATE),
    }
    config = json.loads((small / "config.json").read_text())
    for entry in config["jaxmoe"]["modules"].values():
        assert entry["main_experts"] == 2
        assert "renorm" not in entry


def test_missing_vectors_are_an_error(tmp_path):
    small = write("qwen3_moe", tmp_path)
    path = small / "model-layer00001.safetensors"
    tensors = load_file(path)
    lost = "model.layers.1.mlp.experts.auxiliary.down"
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    index = small / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][lost]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"experts\.auxiliary\.down \(missing\)"):
        load(small)
    with pytest.raises(JaxmoeError, match=r"experts\.auxiliary\.down is missing"):
        StoredModel(small)


def test_no_stock_architecture_holds_it(tmp_path):
    small = write("qwen3_moe", tmp_path)
    with pytest.raises(JaxmoeError, match="stock architecture cannot hold"):
        densify(small, tmp_path / "dense")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "small"}


@pytest.mark.parametrize("method", ["svd", "mobe", "d2moe"])
def test_goes_with_fewer_stored_numbers(method, tmp_path):
    """Vectors scale the inputs of factors, mixtures and bases: the same as of the matrices that these stand for."""
    save_tiny("qwen3_moe", tmp_path / "model", **FAMILIES["qwen3_moe"], num_hidden_layers=1)
    options = {"mobe": ("--set", "steps=20"), "d2moe": ("--set", "base=always")}.get(method, ())
    commands = [
        ("compress", tmp_path / "model", tmp_path / "stored", "--method", method, "--ratio", "0.4", *options),
        ("convert", tmp_path / "stored", tmp_path / "dense", "--to", "dense"),
        *(
            ("compress", tmp_path / source, tmp_path / to, "--method", "compressed_experts", "--main-experts", "2")
            for source, to in (("stored", "small"), ("dense", "twin"))
        ),
    ]
    for line in commands:
        done = call(*line, "--json")
        assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["experts_per_token"] == {"before": 4, "after": 2}
    for folder in ("small", "twin"):
        randomize(tmp_path / folder)
    expected = logits(load(tmp_path / "twin", dtype=torch.float32))
    assert distance(logits(load(tmp_path / "small", dtype=torch.float32)), expected) < 2e-5
    assert distance(in_jax(tmp_path / "small"), expected) < 2e-5
    shutil.rmtree(tmp_path / "small")
