"""The decoder against transformers: equal logits and equal routing for a tiny random model of every architecture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
)
IDS = np.arange(48).reshape(2, 24) * 7 % 120 + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    save_tiny(family, tmp_path)
    with torch.no_grad():
        expected = load_tiny(tmp_path, dtype="float32")(input_ids=torch.tensor(IDS), use_cache=False).logits.numpy()
    model = StoredModel(tmp_path)
    found = jax.jit(forward, static_argnames="spec")(jnp.asarray(IDS), model.parameters(), spec=model.spec)
    assert np.std(expected) > 0.5, "logits so near to each other hide errors"
    assert np.linalg.norm(found - expected) <= 2e-5 * np.linalg.norm(expected)
