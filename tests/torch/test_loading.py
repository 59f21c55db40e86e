"""A factored folder: loaded with and without the package, damaged, newer, in part factored, in bfloat16."""

import json
import subprocess
import sys

import pytest
import torch
from factored_models import (
    Terms,
    basis_layer,
    low_rank_layer,
    mixed_layer,
    set_dense,
    shape_of,
    stock_experts,
    write_factored,
)
from safetensors.torch import load_file, save_file
from tiny_models import load_tiny, save_tiny
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jaxmoe.data import demo_checkpoint
from jaxmoe.torch import cache_blends, factored_classes

torch.set_num_threads(1)
TOKENS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(7))
MODULES = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "qwen3_moe"
    save_tiny("qwen3_moe", folder)
    return folder


@pytest.fixture(scope="module")
def factored(dense, tmp_path_factory):
    """A folder in which the first layer is of low rank and the second has shared bases."""
    folder = tmp_path_factory.mktemp("factored") / "qwen3_moe"
    write_factored(
        dense, folder, {MODULES[0]: layer(dense, 0, low_rank_layer), MODULES[1]: layer(dense, 1, basis_layer)}
    )
    return folder


def layer(dense, index, recipe):
    native = stock_experts(load_tiny(dense))[MODULES[index]]
    return recipe(Terms(shape_of(native), seed=index))


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def difference(ours, theirs):
    return float((ours.float() - theirs).norm() / theirs.norm())


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def edited(factored, folder, *, config=lambda c: None, tensors=lambda t: None):
    """Copy a factored folder with changes to its configuration and tensors."""
    folder.mkdir()
    for path in factored.iterdir():
        if path.suffix == ".py":
            (folder / path.name).write_text(path.read_text())
    settings, weights = json.loads((factored / "config.json").read_text()), load_file(factored / "model.safetensors")
    config(settings)
    tensors(weights)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_all_terms_and_their_sums(dense, tmp_path):
    twin, layers = load_tiny(dense), {module: layer(dense, i, mixed_layer) for i, module in enumerate(MODULES)}
    write_factored(dense, tmp_path / "mixed", layers)
    for module, terms in layers.items():
        set_dense(twin.get_submodule(module), terms)
    assert difference(logits(load(tmp_path / "mixed")), logits(twin)) < 1e-5


def test_layers_that_are_not_named_keep_their_stock_experts(dense, tmp_path):
    terms = layer(dense, 1, low_rank_layer)
    folder = tmp_path / "part"
    write_factored(dense, folder, {MODULES[1]: terms})
    stock = {name: x for name, x in load_file(dense / "model.safetensors").items() if ".layers.0.mlp.experts." in name}
    save_file({**load_file(folder / "model.safetensors"), **stock}, folder / "model.safetensors", {"format": "pt"})
    twin, model = load_tiny(dense), load(folder)
    assert type(model.get_submodule(MODULES[0])) is type(twin.get_submodule(MODULES[0]))
    set_dense(twin.get_submodule(MODULES[1]), terms)
    assert difference(logits(model), logits(twin)) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_bfloat16(factored, tmp_path):
    low = load(factored, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert difference(logits(low), logits(load(factored))) < 0.1
    low.save_pretrained(tmp_path / "low")
    again = load(tmp_path / "low", dtype="auto")
    assert torch.equal(logits(again), logits(low))


def test_cache_flag_in_the_configuration(factored, tmp_path):
    folder = edited(factored, tmp_path / "cached", config=lambda c: c["jaxmoe"].update(cache_blends=True))
    model, plain = load(folder), load(factored)
    assert torch.equal(logits(model), logits(plain))
    term = model.get_submodule(f"{MODULES[1]}.down.0")
    assert term.cache
    assert term._kept is not None
    cache_blends(model, False)
    assert term._kept is None


def test_checkpoints_of_other_terms_in_one_process(dense, tmp_path, monkeypatch):
    """Each with its own code, also where their folders have one name."""
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    for number, recipe in enumerate((low_rank_layer, basis_layer, mixed_layer, low_rank_layer)):
        folder = tmp_path / str(number) / "small"
        write_factored(dense, folder, {module: layer(dense, 0, recipe) for module in MODULES})
        twin = load_tiny(dense)
        for module in MODULES:
            set_dense(twin.get_submodule(module), layer(dense, 0, recipe))
        assert difference(logits(load(folder)), logits(twin)) < 1e-5


@pytest.mark.parametrize("name", ["gate_up.0.left", "down.0.right"])
def test_a_missing_tensor_is_an_error(factored, tmp_path, name):
    folder = edited(factored, tmp_path / "hole", tensors=lambda t: t.pop(f"{MODULES[0]}.{name}"))
    with pytest.raises(ValueError, match=rf"{MODULES[0]}\.{name} \(missing\).*fetch or write it again"):
        load(folder)


def test_a_missing_tensor_is_an_error_for_the_base_model_too(factored, tmp_path):
    folder = edited(factored, tmp_path / "hole", tensors=lambda t: t.pop(f"{MODULES[1]}.down.0.bases"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"down\.0\.bases \(missing\)"):
        factored_classes("qwen3_moe")[1].from_pretrained(folder, config=config)


def test_a_stray_tensor_is_an_error(factored, tmp_path):
    stray = {f"{MODULES[0]}.up.0.left": torch.zeros(2, 2)}
    folder = edited(factored, tmp_path / "stray", tensors=lambda t: t.update(stray))
    with pytest.raises(ValueError, match=r"up\.0\.left \(unexpected\)"):
        load(folder)


def test_a_tensor_of_another_shape_is_an_error(factored, tmp_path):
    name = f"{MODULES[0]}.down.0.left"
    folder = edited(factored, tmp_path / "shape", tensors=lambda t: t.update({name: t[name][:-1].contiguous()}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)
    with pytest.raises(ValueError, match=r"down\.0\.left \(mismatched\)"):
        load(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(format_version=4), "format 4.*reads up to 3.*upgrade jaxmoe"),
        (lambda record: record["modules"][MODULES[1]]["terms"]["down"][0].update(kind="wavelet"), "'wavelet'"),
        (lambda record: record["modules"].update({"model.layers.9.mlp.experts": {}}), "no module model.layers.9"),
    ],
)
def test_refuses_what_it_does_not_know(factored, tmp_path, change, message):
    folder = edited(factored, tmp_path / "unknown", config=lambda c: change(c["jaxmoe"]))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_an_older_transformers_is_named_in_the_error(factored, tmp_path, monkeypatch):
    import transformers

    folder = edited(factored, tmp_path / "old")
    for name in ("configuration_jaxmoe.py", "modeling_jaxmoe.py"):
        monkeypatch.setattr(transformers, "__version__", "5.15.3")
        with pytest.raises(ImportError, match=r"5\.16 or newer.*5\.15\.3.*upgrade transformers"):
            exec(compile((folder / name).read_text(), name, "exec"), {"__name__": name})


def test_parallel_plans_leave_the_factors_alone(dense, factored):
    """The stock plans would add up the outputs of experts that every device holds in full."""
    model = load(factored)
    stock, ours = (own._tp_plan or {} for own in (load_tiny(dense), model))
    assert ours == {name: rule for name, rule in stock.items() if ".experts" not in name}
    assert stock.keys() > ours.keys() > set()
    assert not model._ep_plan


def test_installed_classes_save_the_code_too(factored, tmp_path, monkeypatch):
    model = factored_classes("qwen3_moe")[2].from_pretrained(factored)
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    again = load(tmp_path / "saved")
    assert type(again).__module__.startswith("transformers_modules")
    assert torch.equal(logits(again), logits(model))


ALONE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded without trust")

import jaxmoe.torch

loaded = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
assert not [name for name in loaded if "moe" in name], loaded
models = [AutoModelForCausalLM.from_pretrained(folder, **o) for o in ({}, {"trust_remote_code": True})]
models += [AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))]
for model in models:
    assert type(model).__module__ == "jaxmoe.torch.registration", type(model)
base = AutoModel.from_pretrained(folder)
assert type(base).__name__ == "FactoredQwen3MoeModel"
assert AutoConfig.for_model("jaxmoe_olmoe").model_type == "jaxmoe_olmoe"
assert "transformers.models.mixtral.modeling_mixtral" not in sys.modules
torch.save(models[0].eval()(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""


def test_import_makes_the_trust_flag_unnecessary(factored, tmp_path):
    torch.save(TOKENS, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", ALONE, str(factored), str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    assert difference(torch.load(tmp_path / "logits.pt"), logits(load(factored))) < 1e-5


@pytest.mark.parametrize(
    ("registered", "answer", "options"),
    [
        (True, AssertionError, {}),
        (True, AssertionError, {"trust_remote_code": True}),
        (False, AssertionError, {"trust_remote_code": False}),
        (False, AssertionError, {"trust_remote_code": True}),
        # Without a terminal transformers asks nobody, and takes the tokenizer for what its own files say; so it does
        # where somebody just presses the return key.
        (False, EOFError, {}),
        (False, None, {}),
    ],
)
def test_the_tokenizer_needs_no_code(factored, tmp_path, monkeypatch, registered, answer, options):
    """Whoever is asked to run code fails here, but for the one who has no terminal."""
    asked = []

    def ask(*prompt):
        asked.append(prompt)
        if answer is not None:
            raise answer
        return ""

    folder = edited(factored, tmp_path / "spoken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_checkpoint() / name).read_bytes())
    monkeypatch.setattr("builtins.input", ask)
    if not registered:
        monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    text = "A tokenizer, and 12 naïve words."
    ours = AutoTokenizer.from_pretrained(folder, **options)
    assert bool(asked) is (answer is not AssertionError)
    assert ours(text).input_ids == AutoTokenizer.from_pretrained(demo_checkpoint())(text).input_ids


def test_without_torch_the_error_names_the_extra():
    program = "import sys; sys.modules['torch'] = None; import jaxmoe.torch"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert 'ImportError: jaxmoe.torch needs PyTorch and transformers: pip install "jaxmoe[torch]"' in done.stderr
