"""Kimi K2 of Moonshot AI, which is DeepSeek-V3 in all but name; K2.5 and Kimi Linear are read and not run."""

from dataclasses import replace

from jaxmoe.checkpoint.families.deepseek import DEEPSEEK_V3
from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import FIRST_DENSE, MLP_LAYER_TYPES, stock

# The classes are DeepSeek-V3's, so that the publisher's own code is not needed.
KIMI_K2 = replace(DEEPSEEK_V3, model_type="kimi_k2")

KIMI_K25 = replace(DEEPSEEK_V3, model_type="kimi_k25", decoder=None, transformers=None)

KIMI_LINEAR = Family(
    model_type="kimi_linear",
    top_k="num_experts_per_token|num_experts_per_tok",
    moe_layers=(MLP_LAYER_TYPES, FIRST_DENSE),
    router="block_sparse_moe.gate.weight",
    routing="deepseek_v3",
    bias="block_sparse_moe.gate.e_score_correction_bias",
    shared="block_sparse_moe.shared_experts",
    transformers=stock("kimi_linear", "KimiLinear", since="5.17"),
    # Tried with transformers 5.24: its conversion finds no tensors to join.
    not_packed="transformers renames its experts before it unpacks them, and then finds none",
)

FAMILIES = (KIMI_K2, KIMI_K25, KIMI_LINEAR)
