"""Checkpoints of four architectures, drawn by numpy's frozen generator: the same bytes whatever the versions.

Two layers of experts each, all sizes different; the vocabulary is that of a tokenizer that maps bytes to tokens.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, EXPERTS, HEADS, HEAD, VOCABULARY = 32, 24, 8, 4, 8, 256

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_MIXTRAL = {"num_local_experts": EXPERTS, "intermediate_size": INNER, "head_dim": HEAD}
_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": EXPERTS,
        "moe_intermediate_size": INNER,
        "intermediate_size": 56,
        "head_dim": HEAD,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "mixtral": {"architectures": ["MixtralForCausalLM"], **_MIXTRAL},
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 3,
        "num_key_value_heads": HEADS,
        "first_k_dense_replace": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "moe_intermediate_size": INNER,
        "intermediate_size": 56,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        **_MIXTRAL,
        "attention_bias": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _attention(biased: bool = False) -> Shapes:
    for name, heads in (("q", HEADS), ("k", 2), ("v", 2)):
        yield f"self_attn.{name}_proj.weight", (heads * HEAD, HIDDEN)
        if biased:
            yield f"self_attn.{name}_proj.bias", (heads * HEAD,)
    yield "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
    if biased:
        yield "self_attn.o_proj.bias", (HIDDEN,)
        yield "self_attn.sinks", (HEADS,)


def _mlp(prefix: str, inner: int, names=("gate_proj", "up_proj", "down_proj")) -> Shapes:
    for name in names[:2]:
        yield f"{prefix}.{name}.weight", (inner, HIDDEN)
    yield f"{prefix}.{names[2]}.weight", (HIDDEN, inner)


def _qwen3_moe(layer: int) -> Shapes:
    yield from _attention()
    yield from (("self_attn.q_norm.weight", (HEAD,)), ("self_attn.k_norm.weight", (HEAD,)))
    yield "mlp.gate.weight", (EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        yield from _mlp(f"mlp.experts.{expert}", INNER)


def _mixtral(layer: int) -> Shapes:
    yield from _attention()
    yield "block_sparse_moe.gate.weight", (EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        yield from _mlp(f"block_sparse_moe.experts.{expert}", INNER, ("w1", "w3", "w2"))


def _deepseek_v3(layer: int) -> Shapes:
    config = _CONFIGS["deepseek_v3"]
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    plain, rotated, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield "self_attn.q_a_proj.weight", (query, HIDDEN)
    yield "self_attn.q_a_layernorm.weight", (query,)
    yield "self_attn.q_b_proj.weight", (HEADS * (plain + rotated), query)
    yield "self_attn.kv_a_proj_with_mqa.weight", (latent + rotated, HIDDEN)
    yield "self_attn.kv_a_layernorm.weight", (latent,)
    yield "self_attn.kv_b_proj.weight", (HEADS * (plain + value), latent)
    yield "self_attn.o_proj.weight", (HIDDEN, HEADS * value)
    if layer < config["first_k_dense_replace"]:
        yield from _mlp("mlp", config["intermediate_size"])
        return
    yield "mlp.gate.weight", (EXPERTS, HIDDEN)
    yield "mlp.gate.e_score_correction_bias", (EXPERTS,)
    yield from _mlp("mlp.shared_experts", config["n_shared_experts"] * INNER)
    for expert in range(EXPERTS):
        yield from _mlp(f"mlp.experts.{expert}", INNER)


def _gpt_oss(layer: int) -> Shapes:
    yield from _attention(biased=True)
    yield from (("mlp.router.weight", (EXPERTS, HIDDEN)), ("mlp.router.bias", (EXPERTS,)))
    yield from (("mlp.experts.gate_up_proj", (EXPERTS, HIDDEN, 2 * INNER)),)
    yield from (("mlp.experts.gate_up_proj_bias", (EXPERTS, 2 * INNER)),)
    yield from (("mlp.experts.down_proj", (EXPERTS, INNER, HIDDEN)), ("mlp.experts.down_proj_bias", (EXPERTS, HIDDEN)))


_LAYERS = {"qwen3_moe": _qwen3_moe, "mixtral": _mixtral, "deepseek_v3": _deepseek_v3, "gpt_oss": _gpt_oss}


def _shapes(architecture: str, config: Mapping[str, Any]) -> Shapes:
    yield from (("model.embed_tokens.weight", (VOCABULARY, HIDDEN)), ("lm_head.weight", (VOCABULARY, HIDDEN)))
    yield "model.norm.weight", (HIDDEN,)
    for layer in range(config["num_hidden_layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (HIDDEN,)
        for name, shape in _LAYERS[architecture](layer):
            yield f"model.layers.{layer}.{name}", shape


def write_checkpoint(folder: Path, architecture: str, dtype: str) -> Path:
    """Write a checkpoint with its tokenizer.

    Args:
        folder: to create.
        architecture: one of `ARCHITECTURES`.
        dtype: "float32" or "bfloat16".
    """
    folder.mkdir(parents=True)
    config = {"model_type": architecture, "dtype": dtype, **_COMMON, **_CONFIGS[architecture]}
    random = np.random.RandomState(ARCHITECTURES.index(architecture))
    tensors = {}
    for name, shape in _shapes(architecture, config):
        drawn = random.normal(size=shape)
        drawn = 1 + 0.05 * drawn if "norm" in name else (0.1 if "bias" in name else 0.2) * drawn
        tensors[name] = drawn.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(_byte_tokenizer()))
    return folder


def _byte_tokenizer() -> dict[str, Any]:
    """Return a tokenizer of bytes, each spelled as GPT-2 does."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    spelled = dict(zip(plain, map(chr, plain))) | {byte: chr(256 + place) for place, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelled[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }


def write_text(folder: Path) -> Path:
    """Write two texts of made-up words, one as often in capitals, and return their folder."""
    folder.mkdir(parents=True)
    random = np.random.RandomState(99)
    words = ["".join(map(chr, random.randint(97, 123, random.randint(2, 9)))) for _ in range(60)]
    for name, change in (("plain", str), ("loud", str.upper)):
        chosen = random.randint(0, len(words), 400)
        (folder / f"{name}.txt").write_text(" ".join(change(words[place]) for place in chosen) + "\n")
    return folder
