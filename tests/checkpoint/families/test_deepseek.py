"""DeepSeek-MoE-16B: transformers has no class of its own for it; a Qwen2-MoE of equal mathematics lends its logits."""

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

IDS = np.arange(48).reshape(2, 24) * 7 % 120 + 3


@pytest.mark.parametrize("normalize", [False, True])
def test_logits_equal_those_of_qwen2_with_an_open_gate(normalize, tmp_path):
    qwen, deepseek = tmp_path / "qwen", tmp_path / "deepseek"
    save_tiny("qwen2_moe", qwen, mlp_only_layers=[0], norm_topk_prob=normalize, qkv_bias=False)
    theirs = load_file(qwen / "model.safetensors")
    renamed = {}
    for name, array in theirs.items():
        if name.endswith("shared_expert_gate.weight"):
            # The sigmoid of zero is a half, which the other model has in its weights.
            theirs[name] = np.zeros_like(array)
        elif "shared_expert.down_proj" in name:
            renamed[name.replace("shared_expert.", "shared_experts.")] = array / 2
        elif "shared_expert." in name:
            renamed[name.replace("shared_expert.", "shared_experts.")] = array
        else:
            renamed[name] = array
    save_file(theirs, qwen / "model.safetensors", metadata={"format": "pt"})
    sizes = json.loads((qwen / "config.json").read_text())
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    config = {
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        **{name: sizes[name] for name in (*kept, "vocab_size", "num_experts_per_tok")},
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": normalize,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "rms_norm_eps": sizes["rms_norm_eps"],
        "rope_theta": 10000.0,
    }
    deepseek.mkdir()
    for name in [name for name in renamed if "shared_experts" in name]:
        # Two shared experts have 48 channels together, of which nothing comes out of the last eight.
        array = renamed[name]
        axis = 1 if "down_proj" in name else 0
        renamed[name] = np.concatenate([array, np.zeros_like(np.take(array, range(8), axis))], axis)
    save_file(renamed, deepseek / "model.safetensors")
    (deepseek / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        expected = load_tiny(qwen, dtype="float32")(input_ids=torch.tensor(IDS), use_cache=False).logits.numpy()
    model = StoredModel(deepseek)
    found = jax.jit(forward, static_argnames="spec")(jnp.asarray(IDS), model.parameters(), spec=model.spec)
    assert np.std(expected) > 0.4, "logits so near to each other hide errors"
    assert np.linalg.norm(found - expected) <= 2e-5 * np.linalg.norm(expected)
