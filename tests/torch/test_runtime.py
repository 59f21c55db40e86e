"""The experts module by itself: every term, both ways of multiplying, the cache, gradients and refusals."""

import ast
import copy
import sys

import numpy as np
import pytest
import torch
from factored_models import Terms, basis_layer, low_rank_layer, mixed_layer, set_dense, shape_of
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from jaxmoe.factors import CompressedLayer
from jaxmoe.torch import FactoredExperts, cache_blends, runtime, swap_experts

torch.set_num_threads(1)
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 6, 20, 12, 2
RECIPES = {"low_rank": low_rank_layer, "basis": basis_layer, "mixed": mixed_layer}


def native_experts(dtype=torch.float32) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    config._experts_implementation = "eager"
    return Qwen3MoeExperts(config).to(dtype)


def entry(layer: CompressedLayer) -> dict:
    return {"shape": layer.sizes._asdict(), "terms": layer.spec()}


def factored_and_native(recipe, dtype=torch.float32):
    """Return a module with random terms, the stock module with the matrices that they stand for, and the layer."""
    native = native_experts()
    layer = RECIPES[recipe](Terms(shape_of(native)))
    factored = FactoredExperts(native, entry(layer))
    tensors = {name: torch.tensor(np.asarray(x)) for name, x in layer.tensors().items()}
    factored.load_state_dict(tensors, strict=True)
    set_dense(native, layer)
    return factored.to(dtype), native.to(dtype), layer


def routed(tokens=17, experts=EXPERTS, dtype=torch.float32, seed=0):
    """Return activations, chosen experts and their weights."""
    random = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(experts, generator=random)[:TOP_K] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=random).to(dtype), chosen, torch.rand(tokens, TOP_K, generator=random)


def close(ours, theirs, tolerance=1e-5) -> bool:
    return float((ours - theirs).detach().norm()) <= tolerance * float(theirs.detach().norm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_native_module(recipe):
    factored, native, _ = factored_and_native(recipe)
    batch = routed()
    assert close(factored(*batch), native(*batch))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_equal_the_loop(recipe, dtype, monkeypatch):
    factored, _, _ = factored_and_native(recipe, dtype)
    batch = routed(dtype=dtype)
    looped = factored(*batch)
    calls = []

    def grouped(routing, rows, weight):
        calls.append(weight.shape)
        return runtime._grouped(rows, weight, routing.offsets)

    monkeypatch.setattr(runtime.Routing, "linear", grouped)
    out = factored(*batch)
    assert calls
    assert any(size % 8 for shape in calls for size in shape[1:]), "no size that has to be filled up"
    assert close(out.float(), looped.float(), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_token_and_none(recipe):
    factored, native, _ = factored_and_native(recipe)
    one = routed(tokens=1)
    assert close(factored(*one), native(*one))
    none = (torch.zeros(0, HIDDEN), torch.zeros(0, TOP_K, dtype=torch.int64), torch.zeros(0, TOP_K))
    assert factored(*none).shape == (0, HIDDEN)


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_stays_near_float32(recipe):
    factored, native, _ = factored_and_native(recipe)
    batch = routed()
    low = factored.to(torch.bfloat16)(batch[0].bfloat16(), *batch[1:])
    assert low.dtype == torch.bfloat16
    assert close(low.float(), native(*batch), 0.02)


@pytest.mark.parametrize("recipe", RECIPES)
def test_traces_without_a_break(recipe):
    factored, native, _ = factored_and_native(recipe)
    batch = routed()
    compiled = torch.compile(factored, fullgraph=True, backend="eager")
    assert close(compiled(*batch), native(*batch))


@pytest.mark.parametrize("recipe", ["low_rank", "basis"])
def test_gradients_follow_the_dense_matrices(recipe):
    """d loss / d factor through the factors, against the chain rule by hand from the stock module's gradient."""
    factored, native, layer = factored_and_native(recipe)
    batch = routed()
    factored(*batch).square().sum().backward()
    native(*batch).square().sum().backward()
    dense = native.down_proj.grad
    if recipe == "low_rank":
        right = torch.tensor(layer.terms["down"][0].right)
        expected = torch.einsum("eoi,eri->eor", dense, right).reshape(EXPERTS * HIDDEN, -1)
        assert close(factored.down[0].left.grad, expected)
    else:
        coefficients = torch.tensor(layer.terms["down"][0].coefficients)
        features = torch.einsum("eoi,eir->ero", dense, coefficients)
        mixing, bases = (torch.tensor(x) for x in (layer.terms["down"][0].mixing, layer.terms["down"][0].bases))
        blend = torch.einsum("em,mro->ero", mixing, bases)
        slope = torch.sigmoid(blend) * (1 + blend * (1 - torch.sigmoid(blend)))
        assert close(factored.down[0].mixing.grad, torch.einsum("ero,mro->em", features * slope, bases), 1e-4)
    assert all(p.grad is not None for p in factored.parameters())


def spy_on_blends(monkeypatch) -> list[int]:
    """Record for how many experts blends are formed, call by call."""
    formed, original = [], runtime.SharedBasisTerm.features

    def features(term, mixing):
        formed.append(len(mixing))
        return original(term, mixing)

    monkeypatch.setattr(runtime.SharedBasisTerm, "features", features)
    return formed


def test_blends_are_formed_only_for_experts_with_tokens(monkeypatch):
    factored, _, _ = factored_and_native("basis")
    formed = spy_on_blends(monkeypatch)
    factored(torch.randn(3, HIDDEN), torch.tensor([[1, 4], [4, 1], [1, 4]]), torch.rand(3, TOP_K))
    assert formed == [2, 2, 2]  # of six experts, for each of gate, up and down


def test_blends_in_small_blocks_are_the_same(monkeypatch):
    factored, native, _ = factored_and_native("basis")
    formed = spy_on_blends(monkeypatch)
    monkeypatch.setattr(runtime, "BLEND_NUMBERS", 2 * 7 * HIDDEN)
    batch = routed()
    assert close(factored(*batch), native(*batch))
    assert max(formed) <= 3
    assert sum(formed) == 3 * len(batch[1].unique())


def test_cache_serves_until_a_parameter_changes(monkeypatch):
    factored, native, _ = factored_and_native("basis")
    batch = routed()
    formed = spy_on_blends(monkeypatch)
    cache_blends(factored)
    with torch.no_grad():
        assert close(factored(*batch), native(*batch))
        assert formed == [EXPERTS] * 3
        factored(*batch)
        assert len(formed) == 3
        factored.down[0].mixing.mul_(2)
        changed = factored(*batch)
        assert len(formed) == 4
        assert not close(changed, native(*batch), 0.01)
        cache_blends(factored, False)
        assert close(changed, factored(*batch))


def test_cache_is_not_used_where_gradients_are_recorded(monkeypatch):
    factored, _, _ = factored_and_native("basis")
    cache_blends(factored)
    with torch.no_grad():
        factored(*routed())
    factored(*routed()).sum().backward()
    assert factored.down[0].mixing.grad.abs().sum() > 0


def test_every_parameter_is_two_dimensional():
    """Serving engines take an experts module with nothing but three-dimensional parameters for a stock one."""
    factored, _, _ = factored_and_native("mixed")
    assert {p.dim() for p in factored.parameters()} == {2}


def test_swap_on_the_meta_device_allocates_nothing():
    class Holder(torch.nn.Module):
        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            self.experts = native_experts(torch.bfloat16)

    with torch.device("meta"):
        model = Holder()
    layer = mixed_layer(Terms(shape_of(model.experts)))
    swap_experts(model, {"model.experts": entry(layer)})  # the base model's paths lack the prefix
    assert isinstance(model.experts, FactoredExperts)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    copied = copy.deepcopy(model)
    assert copied.state_dict().keys() == {f"experts.{name}" for name in layer.tensors()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["terms"].update(down=[{"kind": "wavelet"}]), "unknown term 'wavelet' in down.*dense, low_rank"),
        (lambda e: e["terms"].update(sideways=[{"kind": "dense"}]), "unknown target 'sideways'"),
        (lambda e: e["terms"].pop("down"), "no term for down"),
        (lambda e: e["terms"].update(gate_up=[]), "no term for gate, up"),
        (lambda e: e["shape"].update(hidden=21), r"\(6, 21, 12\).*\(6, 20, 12\)"),
        (lambda e: e["shape"].update(gated=False), "gated False"),
        (lambda e: e["terms"]["down"][0].pop("rank"), "rank"),
    ],
)
def test_refuses_a_spec_that_does_not_fit(change, message):
    model = torch.nn.ModuleDict({"experts": native_experts()})
    model.base_model_prefix = "model"
    spec = entry(low_rank_layer(Terms(shape_of(model["experts"]))))
    change(spec)
    with pytest.raises(ValueError, match=f"experts: .*{message}"):
        swap_experts(model, {"experts": spec})


def test_refuses_an_unknown_activation():
    model = torch.nn.ModuleDict({"experts": native_experts()})
    model.base_model_prefix = "model"
    spec = entry(basis_layer(Terms(shape_of(model["experts"]))))
    spec["terms"]["down"][0]["activation"] = "mish"
    with pytest.raises(ValueError, match="unknown activation 'mish'"):
        swap_experts(model, {"experts": spec})


def test_names_every_missing_module():
    model = torch.nn.ModuleDict({"experts": native_experts()})
    model.base_model_prefix = "model"
    with pytest.raises(ValueError, match=r"no module layers\.7\.experts, layers\.8\.experts"):
        swap_experts(model, {"layers.7.experts": {}, "experts": {}, "layers.8.experts": {}})


def test_terms_and_activations_are_those_of_the_core():
    from jaxmoe.export import factored
    from jaxmoe.factors import layer, shared_basis

    assert runtime.TERMS.keys() == layer.KINDS.keys()
    assert runtime.SharedBasisTerm.activations.keys() == shared_basis.ACTIVATIONS.keys()
    assert set(runtime.TARGETS) == set(layer.TARGETS)
    assert factored.FORMAT_VERSION == runtime.FORMAT_VERSION


@pytest.mark.parametrize("activation", list(runtime.SharedBasisTerm.activations))
def test_activations_equal_those_of_the_core(activation):
    from jaxmoe.factors.shared_basis import ACTIVATIONS

    x = torch.linspace(-4, 4, 101)
    theirs = np.asarray(ACTIVATIONS[activation](x.numpy()))
    np.testing.assert_allclose(runtime.SharedBasisTerm.activations[activation](x).numpy(), theirs, atol=2e-6)


def test_runtime_file_stands_alone():
    """It is copied into checkpoints, where only transformers and what that needs is sure to be there."""
    with open(runtime.__file__, encoding="utf-8") as file:
        text = file.read()
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "transformers", "packaging"}
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0")
