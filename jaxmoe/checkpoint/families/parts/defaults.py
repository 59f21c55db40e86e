"""What configs mean by keys that are not there, as most of transformers' configuration classes say it.

What an architecture says differently stands in its record. Those that transformers has no class for have the defaults
of the code that their publishers give along. What follows from other keys (a window in every fourth layer) is with the
builders.
"""

from collections.abc import Mapping
from typing import Any

USUAL: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
"""What most architectures mean."""


def sizes(
    vocabulary: int,
    hidden: int,
    intermediate: int | None,
    *,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    positions: int,
) -> dict[str, int]:
    """Return the defaults of the sizes that every config has, under their keys; None where there is none.

    Example:
        >>> sizes(32000, 4096, None, layers=32, heads=32, positions=2048)["num_attention_heads"]
        32
    """
    found = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
    }
    return {key: size for key, size in found.items() if size is not None}
