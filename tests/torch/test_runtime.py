"""The experts module by itself: every term, both ways of multiplying, the cache, gradients and refusals."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from factored_models import NEW, Terms, base_layer, basis_layer, low_rank_layer, mixed_layer, set_dense, shape_of
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from jaxmoe.factors import CompressedLayer, Hashed, LayerShape
from jaxmoe.factors.hashed import buckets
from jaxmoe.torch import FactoredExperts, cache_blends, register, swap_modules
from jaxmoe.torch.runtime import requirements
from jaxmoe.torch.runtime import routing as products
from jaxmoe.torch.runtime.blended import ACTIVATIONS
from jaxmoe.torch.runtime.experts import TARGETS
from jaxmoe.torch.runtime.grouped import GroupedTerm
from jaxmoe.torch.runtime.hashed import HashedTerm
from jaxmoe.torch.runtime.routing import Routing
from jaxmoe.torch.runtime.shared import SharedTerm
from jaxmoe.torch.runtime.shared_basis import SharedBasisTerm
from jaxmoe.torch.runtime.term import TERMS

torch.set_num_threads(1)
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 6, 20, 12, 2
RECIPES = {"low_rank": low_rank_layer, "basis": basis_layer, "mixed": mixed_layer, **NEW}


def native_experts(dtype=torch.float32) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    config._experts_implementation = "eager"
    return Qwen3MoeExperts(config).to(dtype)


def entry(layer: CompressedLayer) -> dict:
    return {"kind": "experts", "shape": layer.sizes._asdict(), "terms": layer.spec()}


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
        return products._grouped(rows, weight, routing.offsets)

    monkeypatch.setattr(Routing, "linear", grouped)
    monkeypatch.setattr(Routing, "together", lambda routing, rows: True)
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


@pytest.mark.parametrize("compiling", [True, False])
@pytest.mark.parametrize("recipe", NEW)
def test_padded_products_of_all_experts_or_of_those_with_rows(recipe, compiling, monkeypatch):
    """As on an accelerator, where one call multiplies for all experts, traced or not."""
    factored, native, _ = factored_and_native(recipe)
    padded, original = [], GroupedTerm._together

    def together(term, rows, routing, experts, features):
        padded.append(len(experts))
        return original(term, rows, routing, experts, features)

    monkeypatch.setattr(GroupedTerm, "_together", together)
    monkeypatch.setattr(Routing, "together", lambda routing, rows: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    batch = torch.randn(3, HIDDEN), torch.tensor([[1, 4], [4, 1], [1, 4]]), torch.rand(3, TOP_K)
    assert close(factored(*batch), native(*batch))
    assert set(padded) == {EXPERTS if compiling else 2}


@pytest.mark.parametrize("recipe", NEW)
def test_gradients_equal_those_through_the_matrices(recipe):
    """d loss / d parameter, against automatic differentiation of JAX's matrices with the stock module's gradients."""
    factored, native, layer = factored_and_native(recipe)
    batch = routed()
    factored(*batch).square().sum().backward()
    native(*batch).square().sum().backward()
    gate, up = native.gate_up_proj.grad.chunk(2, 1)
    dense = {name: x.numpy() for name, x in (("gate", gate), ("up", up), ("down", native.down_proj.grad))}

    def product(own):
        return sum(jnp.sum(own.materialize(name) * gradient) for name, gradient in dense.items())

    expected = jax.jit(jax.grad(product, allow_int=True))(layer).tensors()
    for name, parameter in factored.named_parameters():
        assert close(parameter.grad, torch.tensor(np.asarray(expected[name])), 1e-4), name
    whole = {name: buffer.dtype for name, buffer in factored.named_buffers()}
    assert whole == {name: torch.int32 for name, x in layer.tensors().items() if x.dtype == np.int32}


def test_base_is_applied_once_for_every_token(monkeypatch):
    """Before the tokens go to their experts, and behind their weighted sum: no row for every choice."""
    factored, native, _ = factored_and_native("base")
    seen, original = [], SharedTerm.forward

    def forward(term, rows, routing=None):
        seen.append(len(rows))
        return original(term, rows, routing)

    monkeypatch.setattr(SharedTerm, "forward", forward)
    batch = routed(tokens=17)
    assert close(factored(*batch), native(*batch))
    assert seen == [17, 17, 17]
    # With a norm behind every expert the sum has to wait for it.
    for module in (factored, native):
        module.has_post_expert_norm, module.post_expert_norm = True, torch.nn.RMSNorm(HIDDEN)
    seen.clear()
    normed = factored(*batch)
    assert seen == [17, 17 * TOP_K, 17 * TOP_K]
    inner = native._apply_gate(torch.einsum("th,eoh->teo", batch[0], native.gate_up_proj))
    out = native.post_expert_norm(torch.einsum("tei,eoi->teo", inner, native.down_proj))
    chosen = torch.gather(out, 1, batch[1][..., None].expand(-1, -1, HIDDEN))
    assert close(normed, (chosen * batch[2][..., None]).sum(1))


def test_masked_channels_are_those_of_the_core():
    """The same channels as in JAX, chosen from the tokens before they go to their experts."""
    draw = Terms(LayerShape(EXPERTS, HIDDEN, INTERMEDIATE))
    for kept, axis in ((None, "out"), (9, "in"), (4, "out")):
        term = draw.shared("gate_up", kept, axis, dynamic=5)
        twin = SharedTerm(term.spec(), term.shape, {"dtype": torch.float32, "device": "cpu"})
        twin.load_state_dict({name: torch.tensor(x) for name, x in term.tensors().items()})
        rows = routed()[0]
        assert close(twin(rows), torch.tensor(np.asarray(term.apply(jnp.asarray(rows.numpy())))))
        assert not close(twin(rows), rows @ torch.tensor(np.asarray(term.materialize()))[0].T, 0.01)


@pytest.mark.parametrize("balanced", [True, False])
def test_hash_is_that_of_the_core(balanced):
    """Entry for entry, also where 32 bits overflow and the seed is large."""
    entries, seed = np.arange(0, 2**31, 12345677, dtype=np.uint32), 2**31 - 5
    expected = buckets(entries, np.array([seed], np.uint32), np.uint32(1000003), balanced=balanced)
    term = Hashed.abstract((4, 5, 6), "float32", buckets=7, balanced=balanced)
    twin = HashedTerm(term.spec(), term.shape, {"dtype": torch.float32, "device": "cpu"})
    twin.seed.fill_(seed)
    found = twin._bucket(torch.tensor(entries.astype(np.int64)), 1000003)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_ranks_that_do_not_add_up_are_refused():
    factored, _, layer = factored_and_native("base")
    tensors = {name: torch.tensor(np.asarray(x)) for name, x in layer.tensors().items()}
    tensors["gate_up.1.ranks"] = tensors["gate_up.1.ranks"] + 1
    with pytest.raises(ValueError, match=r"ranks \[5, 1, 8, .*fetch or write it again"):
        factored.load_state_dict(tensors)


def test_whole_numbers_fit_the_sizes_before_anything_is_loaded():
    """So that a model made from a configuration alone runs."""
    for recipe in NEW.values():
        native = native_experts()
        factored = FactoredExperts(native, entry(recipe(Terms(shape_of(native)))))
        assert torch.isfinite(factored(*routed())).all()


def test_autocast():
    for recipe in NEW:
        factored, native, _ = factored_and_native(recipe)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            low = factored(*routed())
        assert close(low.float(), native(*routed()), 0.03)


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
    formed, original = [], SharedBasisTerm.features

    def features(term, mixing):
        formed.append(len(mixing))
        return original(term, mixing)

    monkeypatch.setattr(SharedBasisTerm, "features", features)
    return formed


def test_blends_are_formed_only_for_experts_with_tokens(monkeypatch):
    factored, _, _ = factored_and_native("basis")
    formed = spy_on_blends(monkeypatch)
    factored(torch.randn(3, HIDDEN), torch.tensor([[1, 4], [4, 1], [1, 4]]), torch.rand(3, TOP_K))
    assert formed == [2, 2, 2]  # of six experts, for each of gate, up and down


def test_blends_in_small_blocks_are_the_same(monkeypatch):
    factored, native, _ = factored_and_native("basis")
    formed = spy_on_blends(monkeypatch)
    monkeypatch.setattr(products, "BLEND_NUMBERS", 2 * 7 * HIDDEN)
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
    layer = base_layer(Terms(shape_of(model.experts)))
    swap_modules(model, {"model.experts": entry(layer)})  # the base model's paths lack the prefix
    assert isinstance(model.experts, FactoredExperts)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    copied = copy.deepcopy(model)
    assert copied.state_dict().keys() == {f"experts.{name}" for name in layer.tensors()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["terms"].update(down=[{"kind": "wavelet"}]), "unknown term 'wavelet' in down.*dense, grouped"),
        (lambda e: e["terms"].update(sideways=[{"kind": "dense"}]), "unknown target 'sideways'"),
        (lambda e: e["terms"].pop("down"), "no term for down"),
        (lambda e: e["terms"].update(gate_up=[]), "no term for gate, up"),
        (lambda e: e["shape"].update(hidden=21), r"\(6, 21, 12\).*\(6, 20, 12\)"),
        (lambda e: e["shape"].update(gated=False), "gated False"),
        (lambda e: e.update(kind="embedding"), "unknown kind 'embedding': this code knows experts, linear"),
        (lambda e: e["terms"]["down"][0].pop("rank"), "rank"),
    ],
)
def test_refuses_a_spec_that_does_not_fit(change, message):
    model = torch.nn.ModuleDict({"experts": native_experts()})
    model.base_model_prefix = "model"
    spec = entry(low_rank_layer(Terms(shape_of(model["experts"]))))
    change(spec)
    with pytest.raises(ValueError, match=f"experts: .*{message}"):
        swap_modules(model, {"experts": spec})


def test_refuses_an_unknown_activation():
    model = torch.nn.ModuleDict({"experts": native_experts()})
    model.base_model_prefix = "model"
    spec = entry(basis_layer(Terms(shape_of(model["experts"]))))
    spec["terms"]["down"][0]["activation"] = "mish"
    with pytest.raises(ValueError, match="unknown activation 'mish'"):
        swap_modules(model, {"experts": spec})


def test_names_every_missing_module():
    model = torch.nn.ModuleDict({"experts": native_experts()})
    model.base_model_prefix = "model"
    with pytest.raises(ValueError, match=r"no module layers\.7\.experts, layers\.8\.experts"):
        swap_modules(model, {"layers.7.experts": {}, "experts": {}, "layers.8.experts": {}})


def test_terms_and_activations_are_those_of_the_core():
    from jaxmoe.checkpoint import factored_format
    from jaxmoe.factors import layer, registry, shared_basis

    register()
    assert TERMS.keys() == registry.KINDS.keys()
    assert ACTIVATIONS.keys() == shared_basis.ACTIVATIONS.keys()
    assert set(TARGETS) == set(layer.TARGETS)
    assert factored_format.FORMAT_VERSION == requirements.FORMAT_VERSION


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_equal_those_of_the_core(activation):
    from jaxmoe.factors import shared_basis

    x = torch.linspace(-4, 4, 101)
    theirs = np.asarray(shared_basis.ACTIVATIONS[activation](x.numpy()))
    np.testing.assert_allclose(ACTIVATIONS[activation](x).numpy(), theirs, atol=2e-6)
