"""Checkpoints whose terms hold whole numbers: through files, casts, devices and conversion, in whole models."""

import numpy as np
import pytest
import torch
from factored_models import (
    NEW,
    Terms,
    base_layer,
    residual_layer,
    set_dense,
    shape_of,
    stock_experts,
    write_factored,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import load_tiny, save_tiny
from transformers import AutoModelForCausalLM

from jaxmoe import Checkpoint, CompressedCheckpoint, densify
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import registry as core
from jaxmoe.torch import FactoredExperts
from jaxmoe.torch.runtime import term as runtime

torch.set_num_threads(1)
TOKENS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(7))
# Biases of down and interleaved gates; no gates; the usual.
FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h")


@pytest.fixture(scope="module", params=FAMILIES)
def stored(request, tmp_path_factory):
    """Return the folder of a factored model with all new kinds, its dense twin, and its layers."""
    root = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, root / "dense")
    twin, layers = load_tiny(root / "dense"), {}
    recipes = list(NEW.values())
    for index, (path, native) in enumerate(stock_experts(twin).items()):
        # The last layers first: all three kinds, if there are three layers.
        layers[path] = recipes[(index + 1) % 3](Terms(shape_of(native), seed=index))
        set_dense(native, layers[path])
    write_factored(root / "dense", root / "factored", layers)
    return root / "factored", twin, layers


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def difference(ours, theirs):
    return float((ours.float() - theirs).norm() / theirs.norm())


def whole_numbers(entries) -> dict:
    names = ("ranks", "order", "kept", "seed", "indices", "counts")
    return {name: x for name, x in entries.items() if name.split(".")[-1] in names}


def test_equals_the_dense_twin(stored, tmp_path):
    folder, twin, _ = stored
    model = load(folder)
    assert difference(logits(model), logits(twin)) < 1e-5
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **settings), twin.generate(TOKENS, **settings))
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    one, other = model.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_casts_leave_whole_numbers_alone(stored, tmp_path):
    folder, _, _ = stored
    plain = load(folder)
    expected = whole_numbers(plain.state_dict())
    assert expected
    low = load(folder, dtype=torch.bfloat16)
    for model in (low, load(folder).to(torch.float16)):
        found = whole_numbers(model.state_dict())
        assert {x.dtype for x in found.values()} == {torch.int32}
        assert all(torch.equal(x, found[name]) for name, x in expected.items())
    assert difference(logits(low), logits(plain)) < 0.1
    low.save_pretrained(tmp_path / "low")
    again = load(tmp_path / "low", dtype="auto")
    assert torch.equal(logits(again), logits(low))
    with safe_open(tmp_path / "low" / "model.safetensors", "pt") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    # The architecture may have another prefix on disk.
    assert list(whole_numbers(types).values()) == ["I32"] * len(expected)


def test_meta_device_allocates_nothing(stored):
    folder, _, layers = stored
    config = load(folder).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    state = model.state_dict()
    assert {x.device.type for name, x in state.items() if "experts" in name} == {"meta"}
    assert {name for name in state if ".experts." in name} >= {
        f"{module}.{name}" for module, layer in layers.items() for name in layer.tensors()
    }


def test_count_is_what_the_file_holds(stored):
    folder, _, layers = stored
    opened = CompressedCheckpoint.open(folder)
    held = {name: entry for name, entry in opened.tensors.items() if name.startswith(tuple(f"{m}." for m in layers))}
    mine = [entry for name, entry in held.items() if not name.endswith("_bias")]
    assert opened.count().numbers == sum(entry.numbers for entry in mine)
    assert opened.count().bytes == sum(entry.bytes for entry in mine)
    assert {entry.dtype for entry in mine} == {"F32", "I32"}
    for module, layer in layers.items():
        for name in layer.sizes.projections:
            np.testing.assert_array_equal(opened.layer(module).materialize(name), layer.materialize(name))


def test_a_missing_order_is_an_error(stored, tmp_path):
    folder, _, layers = stored
    name = next(f"{module}.{name}" for module, x in layers.items() for name in x.tensors() if name.endswith("order"))
    (tmp_path / "hole").mkdir()
    for path in folder.iterdir():
        (tmp_path / "hole" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, tmp_path / "hole" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} \(missing\)"):
        load(tmp_path / "hole")
    with pytest.raises(JaxmoeError, match="order"):
        CompressedCheckpoint.open(tmp_path / "hole")


def test_an_older_reader_refuses_the_kind_by_name(stored, monkeypatch):
    folder, twin, layers = stored
    monkeypatch.setattr(core, "KINDS", {name: core.KINDS[name] for name in ("dense", "low_rank", "shared_basis")})
    with pytest.raises(JaxmoeError, match=r"unknown term '(grouped|shared)'.*knows dense, low_rank, shared_basis"):
        CompressedCheckpoint.open(folder)
    monkeypatch.setattr(runtime, "TERMS", {"dense": runtime.TERMS["dense"]})
    (path, own), *_ = layers.items()
    native = twin.get_submodule(path)
    with pytest.raises(ValueError, match=r"unknown term '(grouped|shared)'.*knows dense"):
        FactoredExperts(native, {"shape": own.sizes._asdict(), "terms": own.spec()})


def test_conversion_to_dense_equals_direct_dense_export(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "source")
    checkpoint, layers = Checkpoint.open(tmp_path / "source"), {}
    for index, recipe in enumerate((residual_layer, base_layer)):
        source = checkpoint.layers[index]
        layers[source.module] = recipe(Terms(source.shape, seed=index))
    write_factored(tmp_path / "source", tmp_path / "small", layers, layouts=checkpoint.layouts())
    densify(tmp_path / "small", tmp_path / "dense")
    converted = read_tensors(tmp_path / "dense")
    assert converted.keys() == checkpoint.tensors.keys()
    for source in checkpoint.layers:
        own = layers[source.module]
        for planned in checkpoint.dense_tensors(source, lambda name, own=own: np.asarray(own.materialize(name))):
            np.testing.assert_array_equal(converted[planned.name].read(), planned.produce())
    assert difference(logits(load(tmp_path / "small")), logits(load(tmp_path / "dense"))) < 2e-5
