"""Factored attention, shared experts and dense MLPs in PyTorch, by themselves and in whole checkpoints."""

import json

import numpy as np
import pytest
import torch
from factored_models import Terms, low_rank_layer, set_dense, shape_of, stock_experts
from safetensors.torch import load_file, save_file
from tiny_models import load_tiny, save_tiny
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import ExpertsModule, LinearLayout, LinearModule, factored_config
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.dense import densify
from jaxmoe.export.remote_code import remote_code
from jaxmoe.factors import CompressedLinear, Dense, Grouped, LinearShape, LowRank, Shared, SharedBasis, Sparse
from jaxmoe.torch import FactoredLinear, register, swap_modules

torch.set_num_threads(1)
TOKENS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(7))
RNG = np.random.default_rng(0)


def draw(*shape, scale=0.3):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def low_rank(out, in_, rank=5):
    return LowRank(left=draw(1, out, rank), right=draw(1, rank, in_))


RECIPES = {
    "dense": lambda out, in_: (Dense(weight=draw(1, out, in_)),),
    "low_rank": lambda out, in_: (low_rank(out, in_),),
    "basis": lambda out, in_: (
        SharedBasis(coefficients=draw(1, out, 3), bases=draw(2, 3, in_), mixing=draw(1, 2), activation="tanh"),
    ),
    "ragged": lambda out, in_: (Grouped.build(draw(1, out, 4), draw(1, 4, in_), [3], activation="silu"),),
    "blended": lambda out, in_: (
        Grouped.build(draw(1, in_, 4), draw(1, 4, out), [3], mixing=draw(1, 1), transposed=True),
    ),
    "base": lambda out, in_: (Shared.build(draw(out, in_), experts=1, kept=[0, 3, 4], axis="out"), low_rank(out, in_)),
    "sparse": lambda out, in_: (
        low_rank(out, in_),
        Sparse(
            values=draw(1, 2),
            indices=np.array([[3, 17]], np.int32),
            counts=np.array([[2]], np.int32),
            experts=1,
            out=out,
            in_=in_,
        ),
    ),
}


def made(name, out=12, in_=20) -> CompressedLinear:
    return CompressedLinear(terms=RECIPES[name](out, in_), sizes=LinearShape(out, in_)).check()


def tensors(linear: CompressedLinear) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(np.array(x)) for name, x in linear.tensors().items()}


def entry(linear: CompressedLinear, bias=False) -> dict:
    return {"kind": "linear", "shape": linear.sizes.as_json(), "terms": linear.spec(), "bias": bias}


def close(ours, theirs, tolerance=1e-5) -> bool:
    return float((ours - theirs).detach().norm()) <= tolerance * float(theirs.detach().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_equals_the_stock_module(name, bias):
    linear, native = made(name), nn.Linear(20, 12, bias=bias)
    native.weight.data = torch.tensor(np.asarray(linear.materialize()))
    with torch.device("meta"):
        factored = FactoredLinear(nn.Linear(20, 12, bias=bias, dtype=torch.float32), entry(linear, bias))
    assert all(parameter.is_meta for parameter in factored.parameters())
    state = {**tensors(linear), **({"bias": native.bias.data} if bias else {})}
    factored.load_state_dict(state, assign=True)
    x = torch.randn(3, 4, 20)
    assert close(factored(x), native(x))
    assert factored(x[:0]).shape == (0, 4, 12)
    assert close(factored.weight, native.weight)
    assert factored.state_dict().keys() == state.keys()
    torch.compiler.reset()
    compiled = torch.compile(factored, fullgraph=True, backend="eager")
    assert close(compiled(x), native(x))
    low = factored.to(torch.bfloat16)
    assert low.weight.dtype == low(x.bfloat16()).dtype == torch.bfloat16
    assert close(low(x.bfloat16()).float(), native(x), 0.03)


def test_gradients_reach_all_factors():
    linear = made("base")
    factored = FactoredLinear(nn.Linear(20, 12), entry(linear, True))
    factored(torch.randn(5, 20)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in factored.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["shape"].update(out=13), r"\(13, 20\).*Linear of \(12, 20\)"),
        (lambda e: e.update(bias=True), "bias True, but the model has a Linear.*False"),
        (lambda e: e.update(terms=[]), "no term"),
        (lambda e: e.update(terms=[{"kind": "wavelet"}]), "unknown term 'wavelet' in a linear map"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    model = nn.ModuleDict({"proj": nn.Linear(20, 12, bias=False)})
    model.base_model_prefix = "model"
    spec = entry(made("low_rank"))
    change(spec)
    with pytest.raises(ValueError, match=f"proj: .*{message}"):
        swap_modules(model, {"model.proj": spec})


CHOSEN = {
    "qwen3_moe": ("self_attn.q_proj", "self_attn.o_proj"),
    # An MLA attention, shared experts, and the dense MLP of the first layer.
    "deepseek_v3": (
        "self_attn.q_a_proj",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_b_proj",
        "mlp.gate_proj",
        "mlp.shared_experts.down_proj",
    ),
    # Biases, and a block that has another name on disk.
    "phimoe": ("self_attn.k_proj", "self_attn.o_proj"),
}


@pytest.fixture(scope="module", params=CHOSEN)
def checkpoint(request, tmp_path_factory):
    """Return a folder with factored experts and linear maps, and the stock model with the same matrices."""
    root = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, root / "dense")
    twin, modules, held, replaced = load_tiny(root / "dense"), {}, {}, set()
    for path, native in stock_experts(twin).items():
        layer = low_rank_layer(Terms(shape_of(native)))
        set_dense(native, layer)
        modules[path] = ExpertsModule(layer.sizes, layer.spec())
        held |= {f"{path}.{name}": torch.tensor(np.asarray(x)) for name, x in layer.tensors().items()}
    for number, (path, native) in enumerate(twin.named_modules()):
        if not path.endswith(CHOSEN[request.param]) or not isinstance(native, nn.Linear):
            continue
        linear = made(list(RECIPES)[number % len(RECIPES)], *native.weight.shape)
        native.weight.data = torch.tensor(np.asarray(linear.materialize()))
        layout = LinearLayout("float32", f"{path}.weight")
        modules[path] = LinearModule(linear.sizes, linear.spec(), layout, native.bias is not None)
        held |= {f"{path}.{name}": x for name, x in tensors(linear).items()}
        replaced.add(f"{path}.weight")
    whole = load_file(root / "dense" / "model.safetensors")
    assert replaced <= whole.keys()
    kept = {n: x for n, x in whole.items() if n not in replaced and ".experts." not in n}
    (root / "small").mkdir()
    save_file({**kept, **held}, root / "small" / "model.safetensors", {"format": "pt"})
    config = factored_config(json.loads((root / "dense" / "config.json").read_text()), modules)
    (root / "small" / "config.json").write_text(json.dumps(config))
    for name, text in remote_code(config).items():
        (root / "small" / name).write_text(text)
    return root / "small", twin, replaced


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("installed", [True, False])
def test_a_whole_checkpoint(checkpoint, installed, tmp_path, monkeypatch):
    folder, twin, replaced = checkpoint
    if installed:
        register()
    else:
        monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not installed)
    assert type(model).__module__.startswith("jaxmoe." if installed else "transformers_modules.")
    assert sum(type(module).__name__ == "FactoredLinear" for module in model.modules()) == len(replaced) > 1
    assert close(logits(model), logits(twin))
    assert model._tp_plan == {}
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=not installed)
    assert torch.equal(logits(again), logits(model))
    low = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not installed, dtype=torch.bfloat16)
    assert low(TOKENS, use_cache=False).logits.dtype == torch.bfloat16


def test_is_read_and_counted(checkpoint):
    folder, twin, replaced = checkpoint
    opened = CompressedCheckpoint.open(folder)
    assert {module.layout.name for module in opened.linears.values()} == replaced
    for path, module in opened.linears.items():
        found = np.asarray(opened.linear(path).materialize())
        np.testing.assert_array_equal(found, twin.get_submodule(path).weight.detach().numpy())
        assert opened.abstract_linear(path).count() == opened.linear(path).count()
        assert module.bias == (twin.get_submodule(path).bias is not None)
    assert opened.count_linears().numbers == sum(opened.linear(path).count().numbers for path in opened.linears)
    held = opened.count().numbers + opened.count_linears().numbers
    assert held + sum(planned.numbers for planned in opened.copied()) == opened.parameters


def test_a_missing_tensor_is_an_error(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = load_file(folder / "model.safetensors")
    begin = tuple(f"{path}." for path in CompressedCheckpoint.open(folder).linears)
    lost = next(name for name in stored if name.startswith(begin) and not name.endswith("bias"))
    del stored[lost]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{lost} \(missing\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(JaxmoeError, match=f"there is no {lost.split('.')[-1]}"):
        CompressedCheckpoint.open(tmp_path)


def test_becomes_dense(tmp_path):
    """Under the names and in the dtype that the original had."""
    save_tiny("qwen3_moe", tmp_path / "dense", dtype="bfloat16")
    whole = load_file(tmp_path / "dense" / "model.safetensors")
    path = "model.layers.1.self_attn.q_proj"
    linear = made("low_rank", *whole[f"{path}.weight"].shape)
    layout = LinearLayout("bfloat16", f"{path}.weight")
    config = factored_config(
        json.loads((tmp_path / "dense" / "config.json").read_text()),
        {path: LinearModule(linear.sizes, linear.spec(), layout)},
    )
    rest = {name: x for name, x in whole.items() if name != layout.name}
    (tmp_path / "small").mkdir()
    held = {f"{path}.{name}": x for name, x in tensors(linear).items()}
    save_file({**rest, **held}, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    densify(tmp_path / "small", tmp_path / "back")
    found = {name: x for file in (tmp_path / "back").glob("*.safetensors") for name, x in load_file(file).items()}
    assert found.keys() == whole.keys()
    expected = torch.tensor(np.asarray(linear.materialize())).to(torch.bfloat16)
    for name, x in found.items():
        assert torch.equal(x, expected if name == layout.name else whole[name]), name
