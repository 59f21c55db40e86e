"""The decoder against transformers: equal logits and equal routing for a tiny random model of every architecture."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import load_tiny, save_tiny

from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.model import forward

torch = pytest.importorskip("torch")

FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "flex_olmo",
    "phimoe",
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "glm4_moe",
    "dots1",
    "minimax_m2",
    "gpt_oss",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "granitemoe",
    "granitemoeshared",
    "glm4_moe_lite",
    "solar_open",
    "exaone_moe",
    "hy_v3",
    "afmoe",
    "mimo_v2_flash",
    "cohere2_moe",
)
IDS = np.arange(48).reshape(2, 24) * 7 % 120 + 3


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
MSCALE = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}

# What published models set and the tiny ones leave at its default.
VARIANTS = {
    "granite multipliers": (
        "granitemoe",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 0.5,
            "attention_bias": True,
        },
    ),
    "yarn and sinks": ("gpt_oss", {"rope_parameters": {**YARN, "truncate": False}, "sliding_window": 5}),
    "yarn in latent attention": ("deepseek_v3", {"rope_parameters": MSCALE, "attention_bias": True}),
    "queries not compressed": ("deepseek_v2", {"q_lora_rank": None, "rope_parameters": MSCALE}),
    "halves in latent attention": ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False}),
    "greedy": ("deepseek_v2", {"topk_method": "greedy"}),
    "sliding everywhere": ("mixtral", {"sliding_window": 6}),
    "sliding from a layer on": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "sliding in all of qwen3": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6, "attention_bias": True}),
    "clipped": ("olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True}),
    "no norm of queries": ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
    "two shared experts": ("ernie4_5_moe", {"moe_num_shared_experts": 2, "use_bias": True}),
    "tied": ("qwen3_moe", {"tie_word_embeddings": True}),
    "alpha": (
        "hunyuan_v1_moe",
        {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 10000.0}},
    ),
    "positions in windows alone": ("exaone_moe", {"sliding_window": 6}),
    "positions everywhere": ("exaone_moe", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "scaled embeddings": ("afmoe", {"sliding_window": 6, "mup_enabled": True, "num_shared_experts": 2}),
    "windows with sinks": ("mimo_v2_flash", {"sliding_window": 6, "attention_value_scale": 0.5}),
    "parallel blocks": (
        "cohere2_moe",
        {
            "sliding_window": 6,
            "expert_selection_fn": "sigmoid",
            "shared_expert_combination_strategy": "sum",
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["full_attention", "sliding_attention"],
            "prefix_dense_intermediate_size": 56,
            "rms_norm_eps": 1e-5,
            "logit_scale": 0.5,
        },
    ),
    "positions in dense layers": (
        "cohere2_moe",
        {
            "num_shared_experts": 2,
            "mlp_layer_types": ["dense", "sparse"],
            "prefix_dense_intermediate_size": 56,
            "prefix_dense_sliding_window_pattern": 2,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
    "llama3": (
        "mixtral",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 10000.0,
            }
        },
    ),
    "longrope": (
        "phimoe",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
                "short_mscale": 1.1,
                "long_mscale": 1.2,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            },
            "lm_head_bias": False,
        },
    ),
}


def compare(folder, expected) -> None:
    """Check our logits of a checkpoint against expected ones."""
    model = StoredModel(folder)
    found = jax.jit(forward, static_argnames="spec")(jnp.asarray(IDS), model.parameters(), spec=model.spec)
    assert np.std(expected) > 0.4, "logits so near to each other hide errors"
    assert np.linalg.norm(found - expected) <= 2e-5 * np.linalg.norm(expected)


def logits(folder):
    """Return transformers' logits of a checkpoint."""
    with torch.no_grad():
        return load_tiny(folder, dtype="float32")(input_ids=torch.tensor(IDS), use_cache=False).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    save_tiny(family, tmp_path)
    compare(tmp_path, logits(tmp_path))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_variants(variant, tmp_path):
    family, changes = VARIANTS[variant]
    save_tiny(family, tmp_path, **changes)
    compare(tmp_path, logits(tmp_path))


# What a config says after somebody edited it, or without what transformers fills in.
EDITED = {
    "an older key beside the newer": ("qwen3_moe", {"rope_scaling": YARN}, ()),
    "two bases": ("mixtral", {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}}, ()),
    "windows without a size": ("exaone_moe", {}, ("sliding_window", "layer_types", "norm_topk_prob")),
    "positions by kind left out": ("mimo_v2_flash", {}, ("rope_parameters", "attention_value_scale")),
    "positions and windows left out": ("gpt_oss", {}, ("rope_parameters", "layer_types", "swiglu_limit")),
    "windows by a pattern left out": ("cohere2_moe", {}, ("layer_types", "layer_norm_eps", "sliding_window")),
}


@pytest.mark.parametrize("case", EDITED)
def test_logits_of_edited_configs(case, tmp_path):
    family, changes, without = EDITED[case]
    save_tiny(family, tmp_path)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in without}))
    compare(tmp_path, logits(tmp_path))


@pytest.mark.parametrize("norm_head", [False, True])
def test_bailing_equals_granite_under_other_names(norm_head, tmp_path):
    """transformers has no such class; a Granite model of equal mathematics lends its logits."""
    granite, bailing = tmp_path / "granite", tmp_path / "bailing"
    save_tiny("granitemoeshared", granite, attention_multiplier=16**-0.5, shared_intermediate_size=48)
    theirs = load_file(granite / "model.safetensors")
    head = theirs["lm_head.weight"]
    renamed = {"lm_head.weight": head * 3, "model.word_embeddings.weight": theirs["model.embed_tokens.weight"]}
    renamed["model.norm.weight"] = theirs["model.norm.weight"]
    for index in range(2):
        layer = f"model.layers.{index}."
        old = {name.removeprefix(layer): x for name, x in theirs.items() if name.startswith(layer)}
        query, key, value = (old[f"self_attn.{name}_proj.weight"] for name in "qkv")
        shared = old["shared_mlp.input_linear.weight"]
        new = {
            "input_layernorm": old["input_layernorm.weight"],
            "post_attention_layernorm": old["post_attention_layernorm.weight"],
            "attention.query_key_value": np.concatenate([query, key, value]),
            "attention.dense": old["self_attn.o_proj.weight"],
            "mlp.gate": old["block_sparse_moe.router.layer.weight"],
            "mlp.shared_experts.gate_proj": shared[:48],
            "mlp.shared_experts.up_proj": shared[48:],
            "mlp.shared_experts.down_proj": old["shared_mlp.output_linear.weight"],
        }
        for expert in range(8):
            both, down = (old[f"block_sparse_moe.{name}_linear.weight"][expert] for name in ("input", "output"))
            parts = {"gate": both[:24], "up": both[24:], "down": down}
            new |= {f"mlp.experts.{expert}.{name}_proj": x for name, x in parts.items()}
        renamed |= {f"{layer}{name}.weight": x for name, x in new.items()}
    bailing.mkdir()
    save_file({name: np.ascontiguousarray(x) for name, x in renamed.items()}, bailing / "model.safetensors")
    sizes = json.loads((granite / "config.json").read_text())
    kept = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size")
    config = {
        "model_type": "bailing_moe",
        **{name: sizes[name] for name in kept},
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 56,
        "num_shared_experts": 2,
        "first_k_dense_replace": 0,
        "norm_topk_prob": True,
        "norm_head": norm_head,
        "rope_theta": 10000.0,
    }
    (bailing / "config.json").write_text(json.dumps(config))

    # With `norm_head` each column of the head has length 1; Granite takes the head that this makes.
    theirs["lm_head.weight"] = head / np.linalg.norm(head, axis=0, keepdims=True) if norm_head else head * 3
    save_file(theirs, granite / "model.safetensors", metadata={"format": "pt"})
    compare(bailing, logits(granite))
