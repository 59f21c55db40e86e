"""Models that start without values, filled as other programs do it: every kind of term, and a whole checkpoint."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from factored_models import (
    NEW,
    Terms,
    basis_layer,
    grouped_layer,
    low_rank_layer,
    mixed_layer,
    residual_layer,
    set_dense,
    shape_of,
    stock_experts,
    write_factored,
)
from safetensors.torch import load_file
from tiny_models import load_tiny, save_tiny
from torch import nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from jaxmoe.torch import FactoredExperts, factored_classes

torch.set_num_threads(1)
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 6, 20, 12, 2
RECIPES = {"low_rank": low_rank_layer, "basis": basis_layer, "mixed": mixed_layer, **NEW}


@contextmanager
def parameters_on_meta():
    """Start parameters on the meta device and buffers where they are, as vLLM and accelerate do."""
    original = nn.Module.register_parameter

    def register(module, name, parameter):
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


def everything_on_meta():
    return torch.device("meta")


def assign(module, tensors):
    module.load_state_dict(tensors, assign=True)


def copy_in_place(module, tensors):
    """Write into memory that nobody has set, without a hook of the modules."""
    module.to_empty(device="cpu")
    for buffer in module.buffers():
        buffer.fill_(77)
    fill(module, tensors)


def fill_parameters_alone(module, tensors):
    """Give the parameters memory, and write into it and into the buffers that are there."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False))
    fill(module, tensors)


def fill(module, tensors):
    there = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            there[name].copy_(tensor)


STARTS = [
    pytest.param(everything_on_meta, assign, id="assign"),
    pytest.param(everything_on_meta, copy_in_place, id="to_empty"),
    pytest.param(parameters_on_meta, assign, id="assign_parameters"),
    pytest.param(parameters_on_meta, fill_parameters_alone, id="parameters_alone"),
]


def native_experts() -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    config._experts_implementation = "eager"
    return Qwen3MoeExperts(config)


def batch():
    random = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(17)])
    return torch.randn(17, HIDDEN, generator=random), chosen, torch.rand(17, TOP_K, generator=random)


def close(ours, theirs, tolerance=1e-5) -> bool:
    return float((ours - theirs).detach().norm()) <= tolerance * float(theirs.detach().norm())


@pytest.mark.parametrize(("recipe", "main"), [*((recipe, None) for recipe in RECIPES), ("grouped", 1)])
@pytest.mark.parametrize(("start", "load"), STARTS)
def test_every_term_computes_the_same(start, load, recipe, main):
    native = native_experts()
    layer = RECIPES[recipe](Terms(shape_of(native)))
    spec = {"shape": layer.sizes._asdict(), "terms": layer.spec(), **({} if main is None else {"main_experts": main})}
    tensors = {name: torch.tensor(np.asarray(x)) for name, x in layer.tensors().items()}
    if main is not None:
        random = torch.Generator().manual_seed(3)
        sizes = {"gate": HIDDEN, "up": HIDDEN, "down": INTERMEDIATE}
        tensors |= {f"auxiliary.{name}": torch.rand(EXPERTS, n, generator=random) for name, n in sizes.items()}
    plain = FactoredExperts(native, spec)
    plain.load_state_dict(tensors)
    with start():
        module = FactoredExperts(native_experts(), spec)
    assert all(parameter.is_meta for parameter in module.parameters())
    load(module, tensors)
    assert close(module(*batch()), plain(*batch()), 1e-6)
    if main is None:
        set_dense(native, layer)
        assert close(module(*batch()), native(*batch()))
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert close(compiled(*batch()), plain(*batch()))


@pytest.mark.parametrize("recipe", NEW)
def test_values_that_are_written_later_count(recipe):
    """A run before the weights are there must leave nothing behind."""
    native = native_experts()
    layer = RECIPES[recipe](Terms(shape_of(native)))
    module = FactoredExperts(native, {"shape": layer.sizes._asdict(), "terms": layer.spec()})
    module(*batch())
    fill(module, {name: torch.tensor(np.asarray(x)) for name, x in layer.tensors().items()})
    set_dense(native, layer)
    assert close(module(*batch()), native(*batch()))


def test_ranks_without_their_largest_in_the_record():
    """As older versions wrote it."""
    native = native_experts()
    layer = grouped_layer(Terms(shape_of(native)))
    spec = {"shape": layer.sizes._asdict(), "terms": layer.spec()}
    for terms in spec["terms"].values():
        for term in terms:
            assert term.pop("widest")
    with torch.device("meta"):
        module = FactoredExperts(native_experts(), spec)
    copy_in_place(module, {name: torch.tensor(np.asarray(x)) for name, x in layer.tensors().items()})
    set_dense(native, layer)
    assert close(module(*batch()), native(*batch()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a folder with groups of experts in one layer and what they leave over in another, and its dense twin."""
    root = tmp_path_factory.mktemp("meta")
    save_tiny("qwen3_moe", root / "dense")
    twin = load_tiny(root / "dense")
    layers = {}
    for recipe, (path, native) in zip((grouped_layer, residual_layer), stock_experts(twin).items()):
        layers[path] = recipe(Terms(shape_of(native)))
        set_dense(native, layers[path])
    write_factored(root / "dense", root / "factored", layers)
    return root / "factored", twin


TOKENS = torch.arange(3, 45).reshape(2, 21)


@pytest.mark.parametrize("load", [assign, fill_parameters_alone])
def test_a_whole_model(checkpoint, load):
    folder, twin = checkpoint
    config, _, causal = factored_classes("qwen3_moe")
    with parameters_on_meta():
        model = causal(config.from_pretrained(folder)).eval()
    load(model, load_file(folder / "model.safetensors"))
    with torch.no_grad():
        assert close(model(TOKENS).logits, twin(TOKENS).logits)


def test_accelerate(checkpoint):
    accelerate = pytest.importorskip("accelerate")
    folder, twin = checkpoint
    config, _, causal = factored_classes("qwen3_moe")
    with accelerate.init_empty_weights():
        model = causal(config.from_pretrained(folder)).eval()
    model = accelerate.load_checkpoint_and_dispatch(model, str(folder / "model.safetensors"))
    with torch.no_grad():
        assert close(model(TOKENS).logits, twin(TOKENS).logits)
