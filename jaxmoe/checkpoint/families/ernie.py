"""ERNIE 4.5 of Baidu."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    COUNTS,
    EPSILON,
    Rule,
    Settings,
    Shapes,
    build,
    grouped_query,
    shared_experts,
    sizes,
    softmax,
    stock,
)
from jaxmoe.model.spec import DecoderSpec


def _sparse(config: Mapping[str, Any], layer: int) -> bool:
    first = config.get("moe_layer_start_index", 0)
    last = config.get("moe_layer_end_index", -1)
    return (layer + 1) % config["moe_layer_interval"] == 0 and first <= layer and (last < 0 or layer <= last)


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    bias = s.take("use_bias")
    router = softmax(
        top_k="moe_k|num_experts_per_tok", selection_bias=True, normalize=True, floor=s.take("moe_norm_min")
    )
    return build(
        s,
        shapes,
        router=router,
        attention=grouped_query(bias=bias, interleaved=True),
        shared=shared_experts("moe_num_shared_experts"),
        mlp_bias=bias,
        head_bias=bias,
    )


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    experts="moe_num_experts",
    top_k="moe_k",
    moe_layers=(Rule(("moe_layer_interval",), _sparse, ("moe_layer_start_index", "moe_layer_end_index")),),
    defaults={
        **sizes(103424, 2560, 12288, layers=28, heads=20, kv_heads=4, positions=131072),
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_norm_min": 1e-12,
    },
    kinds={"moe_num_shared_experts": COUNTS, "moe_norm_min": EPSILON},
    harmless="moe_capacity",
    neutral={
        "use_rmsnorm": (True,),
        "moe_gate": ("topk",),
        "moe_use_aux_free": (True,),
        "compression_ratio": (1.0,),
    },
    routing="softmax_bias",
    bias="mlp.moe_statics.e_score_correction_bias",
    shared="mlp.shared_experts",
    decoder=_decoder,
    transformers=stock("ernie4_5_moe", "Ernie4_5_Moe"),
)

FAMILIES = (ERNIE4_5_MOE,)
