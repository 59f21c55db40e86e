"""From configs to specs: published configs, what transformers makes of them, and what is refused."""

import plain_checkpoint
import published
import pytest

from jaxmoe.checkpoint.families import decoder_spec
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import DenseBlock, ExpertBlock, LatentAttention

# heads, key-value heads, head (or the latent ranks), dense layers, experts, top-k, shared size, tied
SIZES = {
    "deepseek-v2-lite": (16, (None, 512), 1, 64, 6, 2816, False),
    "deepseek-v3": (128, (1536, 512), 3, 256, 8, 2048, False),
    "dots.llm1": (32, (32, 128), 1, 128, 6, 2816, False),
    "ernie-4.5-21b-a3b": (20, (4, 128), 1, 64, 6, 3072, True),
    "glm-4.5-air": (96, (8, 128), 1, 128, 8, 1408, False),
    "gpt-oss-20b": (64, (8, 64), 0, 32, 4, 0, False),
    "granite-3.0-1b-a400m": (16, (8, 64), 0, 32, 8, 0, True),
    "hunyuan-a13b": (32, (8, 128), 0, 64, 8, 3072, True),
    "kimi-k2": (64, (1536, 512), 1, 384, 8, 2048, False),
    "ling-lite": (16, (4, 128), 0, 64, 6, 2816, False),
    "minimax-m2": (48, (8, 128), 0, 256, 8, 0, False),
    "mixtral-8x7b": (32, (8, 128), 0, 8, 2, 0, False),
    "olmoe-1b-7b": (16, (16, 128), 0, 64, 8, 0, False),
    "phi-3.5-moe": (32, (8, 128), 0, 16, 2, 0, False),
    "qwen1.5-moe-a2.7b": (16, (16, 128), 0, 60, 4, 5632, False),
    "qwen3-30b-a3b": (32, (4, 128), 0, 128, 8, 0, False),
}


def spec_of(record: dict):
    return decoder_spec(record, published.shapes(record))


def refused(record: dict) -> str:
    with pytest.raises(JaxmoeError) as error:
        spec_of(record)
    return str(error.value)


@pytest.mark.parametrize("name", published.NAMES)
def test_published_configs_are_understood(name):
    spec = spec_of(published.config(name))
    heads, sizes, dense, experts, top_k, shared, tied = SIZES[name]
    attention, block = spec.layers[-1].attention, spec.layers[-1].feed_forward
    assert isinstance(block, ExpertBlock)
    if isinstance(attention, LatentAttention):
        found = (attention.query_rank, attention.kv_rank)
    else:
        found = (attention.kv_heads, attention.head)
    assert (attention.heads, found) == (heads, sizes)
    assert sum(isinstance(layer.feed_forward, DenseBlock) for layer in spec.layers) == dense
    assert (block.router.experts, block.router.top_k, spec.tied) == (experts, top_k, tied)
    assert (block.shared.intermediate if block.shared else 0) == shared
    hash(spec)


@pytest.mark.parametrize("name", published.NAMES)
def test_transformers_reads_them_alike(name):
    """What transformers' classes make of a config, with their defaults and new names, means the same to us."""
    pytest.importorskip("transformers")
    theirs = published.transformers_reading(name)
    if theirs is None:
        pytest.skip("transformers has no such class")
    record = published.config(name)
    known = {**theirs.to_dict(), "model_type": record["model_type"]}
    assert decoder_spec(known, published.shapes(record)) == spec_of(record)


@pytest.mark.parametrize("name", published.NAMES)
def test_defaults_are_those_of_transformers(name):
    """Where a config leaves out what transformers has a default for, the meaning is the same too."""
    transformers = pytest.importorskip("transformers")
    record = published.config(name)
    model_type = {"kimi_k2": "deepseek_v3"}.get(record["model_type"], record["model_type"])
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("transformers has no such class")
    sizes = ("model_type", "num_", "hidden_size", "vocab", "intermediate", "head_dim", "moe_", "n_routed", "n_shared")
    further = (
        "lora",
        "_dim",
        "layer_types",
        "shared_",
        "first_k",
        "attention_bias",
        "experts_per",
        "partial_",
        "multiplier",
        "scaling",
        "sliding",
    )
    short = {key: value for key, value in record.items() if any(word in key for word in (*sizes, *further))}
    complete = transformers.CONFIG_MAPPING[model_type](
        **{k: v for k, v in short.items() if k != "model_type"}
    ).to_dict()
    known = {**complete, "model_type": record["model_type"]}
    shapes = published.shapes(record)
    assert decoder_spec({**short, "max_position_embeddings": 4096}, shapes) == decoder_spec(known, shapes)


def test_factors_of_particular_models():
    v3 = spec_of(published.config("deepseek-v3"))
    router = v3.layers[-1].feed_forward.router
    assert (router.groups, router.kept_groups, router.scale, router.score) == (8, 4, 2.5, "sigmoid")
    # YaRN: 0.1 ln(40) + 1, squared, over the square root of 192 numbers.
    assert v3.layers[0].attention.scale == pytest.approx(1.3688879454**2 / 192**0.5)
    assert v3.layers[0].attention.rotary.scale == 1
    oss = spec_of(published.config("gpt-oss-20b"))
    assert [layer.attention.window for layer in oss.layers[:2]] == [128, None]
    assert oss.layers[0].attention.rotary.scale == pytest.approx(1.3465735903)
    phi = spec_of(published.config("phi-3.5-moe")).layers[0].attention
    assert (phi.rotary.longest, phi.rotary.long_scale, phi.window) == (4096, 1.243163121016122, 131072)
    granite = spec_of(published.config("granite-3.0-1b-a400m"))
    assert (granite.embedding_scale, granite.logit_scale, granite.layers[0].multiplier) == (12, 1 / 6, 0.22)
    assert len(spec_of(published.config("glm-4.5-air")).layers[0].attention.rotary.frequencies) == 32
    assert len(spec_of(published.config("minimax-m2")).layers[0].attention.rotary.frequencies) == 32


def test_unknown_attributes_are_all_listed():
    message = refused({**published.config("qwen3-30b-a3b"), "new_trick": 3, "other_trick": "yes", "third": [1]})
    assert all(text in message for text in ("new_trick (3)", "other_trick ('yes')", "third ([1])"))
    assert "router_aux_loss_coef" not in message


def test_attributes_that_say_no_pass():
    record = published.config("qwen3-30b-a3b")
    assert spec_of({**record, "new_trick": False, "other": None, "none": [], "nothing": {}}) == spec_of(record)
    assert spec_of({**record, "output_hidden_states": True, "_name_or_path": "x"}) == spec_of(record)


REFUSED = {
    "model type": ("mixtral-8x7b", {"model_type": "mamba"}, "model_type 'mamba'"),
    "activation": ("mixtral-8x7b", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
    "rope type": ("mixtral-8x7b", {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope_type 'spiral'"),
    "rope key": ("mixtral-8x7b", {"rope_scaling": {"type": "yarn", "factor": 2.0, "twist": 1}}, "twist"),
    "rope needs": ("mixtral-8x7b", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    "layer type": ("gpt-oss-20b", {"layer_types": ["chunked_attention"] * 24}, "chunked_attention"),
    "scoring": ("deepseek-v3", {"scoring_func": "tanh"}, "scoring_func = 'tanh'"),
    "no experts per token": ("dots.llm1", {"num_experts_per_tok": None}, "nothing of num_experts_per_tok"),
    "linear attention": ("minimax-m2", {"attn_type_list": [0] * 62}, "attn_type_list"),
    "cross-layer attention": ("hunyuan-a13b", {"use_cla": True}, "use_cla"),
    "another gate": ("ernie-4.5-21b-a3b", {"moe_gate": "top2_fused"}, "moe_gate"),
    "number of layer types": ("gpt-oss-20b", {"layer_types": ["full_attention"]}, "layer_types"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_computed_is_refused(kind):
    name, changes, message = REFUSED[kind]
    assert message in refused({**published.config(name), **changes})


def stored(folder, change=lambda made: None, **changes):
    """Open a checkpoint whose tensors or config were changed."""
    from safetensors.numpy import save_file

    plain_checkpoint.write(folder, **changes)
    made = plain_checkpoint.tensors({**plain_checkpoint.CONFIG, **changes})
    change(made)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return StoredModel(folder)


def test_missing_tensors_are_listed(tmp_path):
    def change(made):
        del made["model.norm.weight"], made["model.layers.1.self_attn.q_norm.weight"]

    with pytest.raises(
        JaxmoeError, match=r"model.layers.1.self_attn.q_norm.weight is missing; model.norm.weight is missing"
    ):
        stored(tmp_path / "x", change)


def test_tensors_that_nothing_uses_are_listed(tmp_path):
    def change(made):
        norm = made["model.norm.weight"]
        made["model.layers.0.self_attn.third_norm.weight"] = norm
        made["model.second_norm.weight"] = norm
        made["model.layers.0.self_attn.rotary_emb.inv_freq"] = norm

    with pytest.raises(JaxmoeError) as error:
        stored(tmp_path / "x", change)
    assert "model.layers.0.self_attn.third_norm.weight" in str(error.value)
    assert "model.second_norm.weight" in str(error.value)
    assert "inv_freq" not in str(error.value)


def test_wrong_shapes_are_listed(tmp_path):
    """Also those whose numbers would be enough."""

    def change(made):
        for name in ("self_attn.o_proj", "self_attn.k_proj"):
            made[f"model.layers.0.{name}.weight"] = made[f"model.layers.0.{name}.weight"].reshape(8, -1).T.copy()
        made["model.layers.1.self_attn.q_norm.weight"] = made["model.norm.weight"]

    with pytest.raises(JaxmoeError) as error:
        stored(tmp_path / "x", change)
    assert "layers.0.self_attn.o_proj.weight: shape [32, 8], config.json says [16, 16]" in str(error.value)
    assert "layers.0.self_attn.k_proj.weight: shape [16, 8], config.json says [8, 16]" in str(error.value)
    assert "layers.1.self_attn.q_norm.weight: shape [16], config.json says [8]" in str(error.value)
