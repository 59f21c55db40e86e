"""The mixtures among the Qwen models of Alibaba: 1.5 and 2, 3, Next, 3.5 and VL."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    COUNT,
    FLAG,
    Rule,
    Settings,
    Shapes,
    build,
    by_kind,
    derive_kinds,
    grouped_query,
    sizes,
    softmax,
    stock,
    where_used,
)
from jaxmoe.model.spec import DecoderSpec


def _sparse(config: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % config["decoder_sparse_step"] == 0 and layer not in (config.get("mlp_only_layers") or ())


_SPARSE_STEP = Rule(("decoder_sparse_step",), _sparse, ("mlp_only_layers",))


def _qwen2_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    used, first = s.take("use_sliding_window"), s.take("max_window_layers")
    derive_kinds(s, lambda index: used and index % 2 == 0 and index < first)
    return build(
        s,
        shapes,
        router=softmax(normalize="norm_topk_prob"),
        attention=grouped_query(bias="qkv_bias", output_bias=False, sliding=by_kind),
        shared=lambda s, index: s.take("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _qwen3_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    attention = grouped_query(norm="head", sliding=where_used)
    return build(s, shapes, router=softmax(normalize="norm_topk_prob"), attention=attention)


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    moe_layers=(_SPARSE_STEP,),
    defaults={
        **sizes(151936, 2048, 5632, layers=24, heads=16, kv_heads=16, positions=32768),
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    kinds={"shared_expert_intermediate_size": COUNT, "qkv_bias": FLAG},
    shared="mlp.shared_expert",
    decoder=_qwen2_moe,
    transformers=stock("qwen2_moe", "Qwen2Moe"),
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    moe_layers=(_SPARSE_STEP,),
    defaults={
        **sizes(151936, 2048, 6144, layers=24, heads=32, kv_heads=4, positions=32768),
        "use_sliding_window": False,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    decoder=_qwen3_moe,
    transformers=stock("qwen3_moe", "Qwen3Moe"),
)

QWEN3_NEXT = Family(
    model_type="qwen3_next",
    moe_layers=(_SPARSE_STEP,),
    shared="mlp.shared_expert",
    transformers=stock("qwen3_next", "Qwen3Next"),
)

QWEN3_5_MOE_TEXT = Family(
    model_type="qwen3_5_moe_text",
    routing="softmax_normalised",
    shared="mlp.shared_expert",
    transformers=stock("qwen3_5_moe", "Qwen3_5Moe", text=True),
)

QWEN3_VL_MOE_TEXT = Family(model_type="qwen3_vl_moe_text", moe_layers=(_SPARSE_STEP,), transposed=None)

FAMILIES = (
    QWEN2_MOE,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_5_MOE_TEXT,
    replace(QWEN3_5_MOE_TEXT, model_type="qwen3_5_moe", transformers=None),
    QWEN3_VL_MOE_TEXT,
    replace(QWEN3_VL_MOE_TEXT, model_type="qwen3_vl_moe"),
)
