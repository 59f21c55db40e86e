"""Arrays in few bits in PyTorch: every kind of store and term, casts, files, whole models, and what older code says."""

import json
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from factored_models import Terms, residual_layer, set_dense, shape_of, stock_experts, write_factored
from tiny_models import load_tiny, save_tiny
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from jaxmoe import Checkpoint, StoredModel, densify
from jaxmoe.checkpoint import factored_format
from jaxmoe.checkpoint.files import read_tensors
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, CompressedLinear, Dense, LinearShape
from jaxmoe.factors.quantised import MixedArray, QuantisedArray
from jaxmoe.factors.store import Store
from jaxmoe.model import forward
from jaxmoe.torch import FactoredExperts, cache_blends
from jaxmoe.torch.runtime.linear import FactoredLinear
from jaxmoe.torch.runtime.stores import MixedArray as RuntimeMixed
from jaxmoe.torch.runtime.stores import stored_array

torch.set_num_threads(1)
TOKENS = torch.randint(3, 128, (2, 13), generator=torch.Generator().manual_seed(7))
STORES = [
    *(Store(bits=bits, group=0) for bits in range(1, 9)),
    Store(bits=3, group=8, zero="none"),
    Store(bits=5, group=4, zero="real", scale="float32"),
    Store(bits=4, group=12, scale="quantised"),
    Store(bits=4, group=8, zero="none", scale="exponent", table="mxfp4"),
    Store(bits=3, group=24, zero="none", table="normal_float", scale="float16"),
    Store(bits=3, group=0, zero="none", table="row"),
    Store(bits=2, group=8, zero="none", table="matrix"),
]


def drawn(shape, store, seed=0):
    """Return an array of random codes, scales, zeros and tables, of numbers near 0.3."""
    random, planned = np.random.default_rng(seed), QuantisedArray.abstract(shape, store)
    sizes = {"scale": 0.6 / 2**store.bits, "unit": 0.005 / 2**store.bits, "table": 0.3, "zero": 2.0 ** (store.bits - 1)}

    def filled(name, array):
        if array.dtype == jnp.uint8:
            return (
                random.integers(1, 255, array.shape).astype(np.uint8)
                if store.scale == "quantised"
                else np.full(array.shape, 124, np.uint8)
            )
        if array.dtype == jnp.int32:
            return random.integers(-(2**31), 2**31, array.shape).astype(np.int32)
        return (sizes[name] * random.uniform(0.5, 1.5, array.shape)).astype(array.dtype)

    names = [name for name in ("codes", "scale", "unit", "zero", "table") if getattr(planned, name) is not None]
    return replace(planned, **{name: filled(name, getattr(planned, name)) for name in names})


def mixed(shape, width):
    """Return matrices with blocks of 2, 3 and 4 bits in a random order."""
    blocks = shape[0] * shape[2] // width
    counts = [1, 2, blocks - 3]
    parts = tuple(drawn((count, shape[1], width), Store(bits=2 + i, group=width), i) for i, count in enumerate(counts))
    order = np.random.default_rng(5).permutation(blocks).astype(np.int32)[None]
    return MixedArray(parts=parts, order=order, width=width, shape=shape)


def tensors_of(array):
    return {name.removeprefix("_"): torch_of(x) for name, x in array.tensors("").items()}


def torch_of(array):
    """Return a tensor of just the same numbers, bfloat16 among them."""
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.asarray(array, np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("store", [*STORES, None], ids=str)
def test_values_equal_those_of_the_core(store):
    array = mixed((5, 7, 24), 8) if store is None else drawn((5, 7, 24), store)
    stored = stored_array(json.loads(json.dumps(array.record())), array.shape)
    tensors = tensors_of(array)
    assert {name: (*x.shape, x.dtype) for name, x in tensors.items()} == stored.tensors()
    expected = np.asarray(array.values())
    np.testing.assert_array_equal(stored.values(tensors), expected)
    np.testing.assert_array_equal(stored.values(tensors, torch.tensor([3, 0, 3])), expected[[3, 0, 3]])
    if not isinstance(stored, RuntimeMixed):
        np.testing.assert_array_equal(stored.values(tensors, rows=slice(2, 5)), expected[:, 2:5])
        np.testing.assert_array_equal(stored.values(tensors, rows=torch.tensor([6, 1])), expected[:, [6, 1]])


def in_few_bits(layer: CompressedLayer) -> CompressedLayer:
    """Hold the arrays of a layer's terms in few bits, all but mixings and means."""
    names = ("weight", "left", "right", "coefficients", "bases", "values")

    def held(name, array):
        # Rows that are no multiples of 4 have one scale.
        bits = {"left": 6, "right": 3, "coefficients": 5}.get(name, 4)
        store = Store(bits=bits, group=4 if array.shape[-1] % 4 == 0 else 0, zero="real" if bits == 5 else "integer")
        return drawn(array.shape, store)

    terms = {
        target: tuple(
            replace(cast(Any, term), **{name: held(name, x) for name, x in term.arrays().items() if name in names})
            for term in own
        )
        for target, own in layer.terms.items()
    }
    return replace(layer, terms=terms)


def factors_layer(t: Terms) -> CompressedLayer:
    """Return blends, groups with blends and without, and mixed widths."""
    blocks = mixed(t.sizes.of("down"), t.sizes.intermediate // 2)
    down = (t.shared_basis("down", transposed=True, mean=True), t.low_rank("down"))
    layer = in_few_bits(
        t.layer(gate=(t.grouped("gate", (5, 2), 3, blended=True),), up=(t.grouped("up"), t.dense("up")), down=down)
    )
    return replace(layer, terms=layer.terms | {"down": (*layer.terms["down"], Dense(weight=blocks))})


LAYERS = {"factors": factors_layer, "residual": lambda t: in_few_bits(residual_layer(t))}


def experts(kind):
    """Return a module with a layer in few bits and the stock one with the matrices that it stands for."""
    config = Qwen3MoeConfig(hidden_size=20, moe_intermediate_size=12, num_experts=6)
    config._experts_implementation = "eager"
    native = Qwen3MoeExperts(config)
    layer = LAYERS[kind](Terms(shape_of(native)))
    entry = {"kind": "experts", "shape": layer.sizes._asdict(), "terms": layer.spec()}
    factored = FactoredExperts(native, entry)
    factored.load_state_dict({name: torch_of(x) for name, x in layer.tensors().items()})
    set_dense(native, layer)
    return factored, native


def close(ours, theirs, tolerance=1e-5) -> bool:
    return float((ours - theirs).detach().norm()) <= tolerance * float(theirs.detach().norm())


@pytest.mark.parametrize("kind", LAYERS)
def test_experts_equal_the_native_module(kind):
    factored, native = experts(kind)
    random = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(6, generator=random)[:2] for _ in range(9)])
    batch = torch.randn(9, 20, generator=random), chosen, torch.rand(9, 2, generator=random)
    expected = native(*batch)
    assert close(factored(*batch), expected)
    cache_blends(factored)
    with torch.no_grad():
        assert close(factored(*batch), expected)
    torch.compiler.reset()
    assert close(torch.compile(factored, fullgraph=True, backend="eager")(*batch), expected)
    low = factored.to(torch.bfloat16)(batch[0].bfloat16(), *batch[1:])
    assert low.dtype == torch.bfloat16
    assert close(low.float(), expected, 0.03)


@pytest.mark.parametrize("store", [Store(bits=4, group=4), STORES[11]], ids=["integers", "no float"])
def test_linear_maps(store):
    linear = CompressedLinear(terms=(Dense(weight=drawn((1, 12, 24), store)),), sizes=LinearShape(12, 24))
    entry = {"kind": "linear", "shape": {"out": 12, "in": 24}, "terms": linear.spec(), "bias": False}
    factored = FactoredLinear(nn.Linear(24, 12, bias=False), entry)
    factored.load_state_dict({name: torch_of(x) for name, x in linear.tensors().items()})
    dense, x = torch.from_numpy(np.array(linear.materialize())), torch.randn(3, 24)
    assert close(factored(x), x @ dense.T)
    assert close(factored.weight, dense)
    assert factored.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return the folder of a factored model in few bits, its dense twin, and its layers."""
    root = tmp_path_factory.mktemp("stores")
    save_tiny("qwen3_moe", root / "dense")
    twin, layers = load_tiny(root / "dense"), {}
    for (path, native), kind in zip(stock_experts(twin).items(), LAYERS, strict=True):
        layers[path] = LAYERS[kind](Terms(shape_of(native)))
        set_dense(native, layers[path])
    write_factored(root / "dense", root / "factored", layers)
    return root / "factored", twin, layers


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_models_equal_their_dense_twins_and_jax(stored):
    folder, twin, _ = stored
    expected = logits(twin)
    assert close(logits(load(folder)), expected)
    model = StoredModel(folder)
    found = jax.jit(forward, static_argnums=2)(jnp.asarray(TOKENS.numpy()), model.parameters(), model.spec)
    assert close(torch.from_numpy(np.array(found)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_leave_stored_tensors_alone_and_files_come_back(stored, dtype, tmp_path):
    folder, _, layers = stored
    model = load(folder, dtype=dtype)
    state = model.state_dict()
    for path, layer in layers.items():
        for name, x in layer.tensors().items():
            own = state[f"{path}.{name}"]
            if name.rsplit("_", 1)[-1] in ("codes", "scale", "zero", "order"):
                assert torch.equal(own, torch_of(x)), name
                assert own.dtype == torch_of(x).dtype, name
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", dtype="auto").state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in state.items())


def test_a_format_of_its_own_that_older_versions_refuse(stored, tmp_path, monkeypatch):
    folder, _, layers = stored
    config = json.loads((folder / "config.json").read_text())
    assert config["jaxmoe"]["format_version"] == 3
    plain = replace(layers["model.layers.0.mlp.experts"], terms={})
    shape = plain.sizes
    terms = {name: [{"kind": "dense"}] for name in shape.projections}
    modules = factored_format.experts_modules({"model.layers.0.mlp.experts": (shape, terms)})
    original, _ = factored_format.read_record(config)
    assert factored_format.factored_config(original, modules)["jaxmoe"]["format_version"] == 2
    monkeypatch.setattr(factored_format, "FORMAT_VERSION", 2)
    with pytest.raises(JaxmoeError, match=r"format 3.*reads up to 2: pip install --upgrade"):
        factored_format.read_record(config)


def test_densify_writes_what_the_terms_stand_for(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    layers = {own.module: LAYERS[kind](Terms(own.shape)) for own, kind in zip(checkpoint.layers, LAYERS, strict=True)}
    write_factored(tmp_path / "source", tmp_path / "small", layers, layouts=checkpoint.layouts())
    densify(tmp_path / "small", tmp_path / "dense")
    converted = read_tensors(tmp_path / "dense")
    for own in checkpoint.layers:
        layer = layers[own.module]
        for planned in checkpoint.dense_tensors(own, lambda name, layer=layer: np.asarray(layer.materialize(name))):
            np.testing.assert_array_equal(converted[planned.name].read(), planned.produce())
