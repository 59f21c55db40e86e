"""A small Qwen3-MoE-shaped checkpoint written with numpy and safetensors alone, for tests of files alone."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def tensors(config=CONFIG, *, dtype=ml_dtypes.bfloat16, seed=0) -> dict[str, np.ndarray]:
    """Return every tensor of the model under its name on disk."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (0.2 * rng.normal(size=shape)).astype(dtype)

    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    heads, groups, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    made = {
        "model.embed_tokens.weight": draw(config["vocab_size"], hidden),
        "lm_head.weight": draw(config["vocab_size"], hidden),
        "model.norm.weight": np.ones(hidden, dtype),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, out, in_ in (("q", heads * head, hidden), ("k", groups * head, hidden), ("v", groups * head, hidden)):
            made[f"{prefix}self_attn.{name}_proj.weight"] = draw(out, in_)
        made[f"{prefix}self_attn.o_proj.weight"] = draw(hidden, heads * head)
        for name in ("q_norm", "k_norm"):
            made[f"{prefix}self_attn.{name}.weight"] = np.ones(head, dtype)
        for name in ("input_layernorm", "post_attention_layernorm"):
            made[f"{prefix}{name}.weight"] = np.ones(hidden, dtype)
        made[f"{prefix}mlp.gate.weight"] = draw(experts, hidden)
        for expert in range(experts):
            for projection, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                made[f"{prefix}mlp.experts.{expert}.{projection}_proj.weight"] = draw(*shape)
    return made


def write(folder: Path, config=CONFIG, *, shards: int = 1, dtype=ml_dtypes.bfloat16, seed=0, **changes) -> Path:
    """Write the checkpoint; `changes` edit the config."""
    folder.mkdir(parents=True)
    config = {**config, **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    made = tensors(config, dtype=dtype, seed=seed)
    if shards == 1:
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(made)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number::shards]
        save_file({name: made[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(own, file))
    index = {"metadata": {"total_size": sum(x.nbytes for x in made.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
