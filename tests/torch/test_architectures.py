"""Every architecture: a factored checkpoint computes what the stock model computes with the same matrices."""

import pytest
import torch
from factored_models import Terms, basis_layer, low_rank_layer, set_dense, shape_of, stock_experts, write_factored
from packaging.version import Version
from tiny_models import FAMILIES, load_tiny, save_tiny
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, __version__

from jaxmoe.checkpoint.families import architecture, exports
from jaxmoe.errors import JaxmoeError
from jaxmoe.torch import factored_classes

torch.set_num_threads(1)
RUN = [family for family in FAMILIES if "factored" in exports(family)]
TOKENS = torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def unregistered(monkeypatch):
    """Let transformers know nothing of the installed package, so that it runs the code in the folder."""
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})


def difference(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("family", RUN)
@pytest.mark.usefixtures("unregistered")
def test_equals_stock_model_with_same_matrices(family, tmp_path):
    if Version(__version__) < Version(architecture(family).since):
        pytest.skip(f"transformers {__version__} lacks {family}")
    save_tiny(family, tmp_path / "dense")
    twin = load_tiny(tmp_path / "dense")
    recipes = (low_rank_layer, basis_layer)
    layers = {}
    for index, (path, native) in enumerate(stock_experts(twin).items()):
        layers[path] = recipes[index % 2](Terms(shape_of(native), seed=index))
    assert layers
    write_factored(tmp_path / "dense", tmp_path / "factored", layers)

    with torch.no_grad():
        original = twin(TOKENS).logits
        for path, layer in layers.items():
            set_dense(twin.get_submodule(path), layer)
        expected = twin(TOKENS).logits
        assert difference(original, expected) > 0.05, "the factors do not move the logits: the test would be vacuous"

        factored = AutoModelForCausalLM.from_pretrained(tmp_path / "factored", trust_remote_code=True).eval()
        assert type(factored).__name__ == f"Factored{architecture(family).causal}"
        assert type(factored).__module__.startswith("transformers_modules.")
        assert difference(factored(TOKENS).logits, expected) < 1e-5
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(factored.generate(TOKENS, **settings), twin.generate(TOKENS, **settings))

        installed = factored_classes(family)[2].from_pretrained(tmp_path / "factored").eval()
        assert torch.equal(factored(TOKENS).logits, installed(TOKENS).logits)

        base = AutoModel.from_pretrained(tmp_path / "factored", trust_remote_code=True).eval()
        hidden = twin.base_model(TOKENS).last_hidden_state
        assert difference(base(TOKENS).last_hidden_state, hidden) < 1e-5

    factored.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert same_state(factored, again)


def same_state(one, other) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", "jetmoe", "longcat_flash", "bert"])
def test_refuses_architectures_that_it_cannot_run(family):
    with pytest.raises(JaxmoeError, match=f"{family}.*export it dense"):
        architecture(family)
