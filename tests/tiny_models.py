"""Tiny random models of every architecture, saved by transformers as checkpoints with the hub's tensor names.

The sizes all differ (hidden 64, expert intermediate 24, 8 experts, shared 40, dense 56), so that a transposed or
mixed-up tensor cannot pass for a right one; the grouped product of torch in bfloat16 wants multiples of 8. Norm weights
stand near their neutral value and all others have a standard deviation of 0.2 or so: with the small weights of a fresh
initialisation the logits would be near uniform and hide errors.
"""

import json
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 64, 24, 8, 128

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MIXTRAL = {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE, "head_dim": 16}
_QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 56, "head_dim": 16}
_DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": INTERMEDIATE,
    "intermediate_size": 56,
    "n_shared_experts": 1,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
_GROUPS = {"n_group": 4, "topk_group": 2}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_KIMI_DELTA = {
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_attn_config": None,
    "num_experts": EXPERTS,
    "moe_intermediate_size": INTERMEDIATE,
    "intermediate_size": 56,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_SHARED = {"shared_expert_intermediate_size": 40}

_CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": _MIXTRAL,
    "minimax": {**_MIXTRAL, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "minimax_m2": {**_MIXTRAL, "rotary_dim": 8},
    "phimoe": {**_MIXTRAL, "head_dim": None, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01},
    "qwen2_moe": {**_QWEN, **_SHARED, "norm_topk_prob": False, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "qwen3_moe": {**_QWEN, "norm_topk_prob": True},
    "qwen3_next": {**_QWEN, **_SHARED, **_DELTA_NET},
    "qwen3_5_moe_text": {**_QWEN, **_SHARED, **_DELTA_NET},
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": INTERMEDIATE},
    "flex_olmo": {"num_experts": EXPERTS, "intermediate_size": INTERMEDIATE},
    "deepseek_v2": {**_DEEPSEEK, **_MLA, **_GROUPS, "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "deepseek_v3": {**_DEEPSEEK, **_MLA, **_GROUPS, "n_shared_experts": 2},
    "kimi_k2": {**_DEEPSEEK, **_MLA, "n_group": 1, "topk_group": 1},
    "glm4_moe": {**_DEEPSEEK, "head_dim": 16, "attention_bias": True, "use_qk_norm": True, "n_group": 1},
    "glm4_moe_lite": {**_DEEPSEEK, **_MLA, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots1": {**_DEEPSEEK, "head_dim": 16, "n_group": 1, "topk_group": 1},
    "solar_open": {**_DEEPSEEK, "head_dim": 16},
    "mimo_v2_flash": {
        **_DEEPSEEK,
        "head_dim": 24,
        "v_head_dim": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "exaone_moe": {
        **_DEEPSEEK,
        "num_experts": EXPERTS,
        "num_shared_experts": 1,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "bailing_hybrid": {**_MLA, **_KIMI_DELTA, "num_expert_group": 4, "topk_group": 2},
    "kimi_linear": {**_MLA, **_KIMI_DELTA, "q_lora_rank": None, "num_expert_group": 1, "topk_group": 1},
    "hy_v3": {**_QWEN, "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"], "router_scaling_factor": 1.5},
    "afmoe": {
        **_QWEN,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "route_scale": 1.5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "lfm2_moe": {
        **_QWEN,
        "head_dim": None,
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "intermediate_size": 56,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_layer_interval": 1,
        "num_hidden_layers": 3,
    },
    "hunyuan_v1_moe": {
        "num_experts": EXPERTS,
        "moe_topk": 2,
        "intermediate_size": INTERMEDIATE,
        "head_dim": 16,
        "pad_token_id": 0,
    },
    "gpt_oss": {
        **_MIXTRAL,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama4_text": {
        **_MIXTRAL,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 56,
        "num_hidden_layers": 3,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
    },
    "granitemoe": {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE},
    "granitemoeshared": {
        "num_local_experts": EXPERTS,
        "intermediate_size": INTERMEDIATE,
        "shared_intermediate_size": 40,
    },
    "granitemoehybrid": {
        "num_local_experts": EXPERTS,
        "intermediate_size": INTERMEDIATE,
        "shared_intermediate_size": 40,
        **_MAMBA,
    },
    "jetmoe": {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE, "kv_channels": 16},
    "jamba": {
        "num_experts": EXPERTS,
        "intermediate_size": INTERMEDIATE,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 3,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "cohere2_moe": {
        "num_experts": EXPERTS,
        "intermediate_size": INTERMEDIATE,
        "num_shared_experts": 1,
        "head_dim": 16,
        "logit_scale": 1.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["sparse", "sparse"],
    },
    "nemotron_h": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": INTERMEDIATE,
        "intermediate_size": 56,
        "moe_shared_expert_intermediate_size": 40,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "num_hidden_layers": None,
        "head_dim": 16,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "dbrx": {
        "d_model": HIDDEN,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": INTERMEDIATE,
            "moe_num_experts": EXPERTS,
            "moe_top_k": 2,
            "moe_normalize_expert_weights": 1.0,
        },
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "intermediate_size": 56,
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "per_layer_config": None,
        "pad_token_id": 0,
    },
}
_UNKNOWN = {"dbrx": {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}}
"""Common settings that an architecture's configuration has no such name for."""
_BUILT_AS = {"kimi_k2": "deepseek_v3"}
"""Architectures that transformers knows under another name."""

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)


def configure(family: str, **changes: Any):
    """Return transformers' configuration of a tiny model; `changes` edit its settings."""
    from transformers import CONFIG_MAPPING

    settings = {**_COMMON, **_CONFIGS[family], **changes}
    settings = {
        key: value
        for key, value in settings.items()
        if key not in _UNKNOWN.get(family, ()) and (value is not None or key == "pad_token_id")
    }
    return CONFIG_MAPPING[_BUILT_AS.get(family, family)](**settings)


def build(family: str, seed: int = 0, **changes: Any):
    """Return a tiny random model in float32, in evaluation mode; `changes` edit its settings."""
    import torch
    from transformers import AutoModelForCausalLM

    config = configure(family, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name or name.endswith(("A_log", "dt_bias", ".D", "layer_scalar")):
            tensor.add_(0.05 * noise)
        elif "bias" in name:
            tensor.copy_(0.1 * noise)
        elif name in parameters:
            tensor.copy_(0.2 * noise)
    return model


def save_tiny(family: str, folder: Path, *, dtype: str = "float32", seed: int = 0, **changes: Any) -> None:
    """Write a tiny random model of one architecture as a checkpoint with the hub's names.

    Args:
        family: one of `FAMILIES`.
        folder: where to; created if need be.
        dtype: `float32` or `bfloat16`; what transformers keeps in float32 stays so.
        seed: of the weights.
        changes: of the settings.
    """
    import torch

    model = build(family, seed, **changes)
    keep = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for owner in model.modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if tensor.dtype == torch.float32 and not name.endswith(("inv_freq", *keep)):
                tensor.data = tensor.data.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder)
    if family in _BUILT_AS:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": family}, indent=2) + "\n")


def load_tiny(folder: Path, **options: Any):
    """Return the transformers model of a checkpoint, also where transformers knows the architecture by another name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((Path(folder) / "config.json").read_text())
    if config["model_type"] in _BUILT_AS:
        settings = {key: value for key, value in config.items() if key != "model_type"}
        options["config"] = AutoConfig.for_model(_BUILT_AS[config["model_type"]], **settings)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
