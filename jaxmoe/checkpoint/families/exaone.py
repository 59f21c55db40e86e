"""EXAONE MoE of LG AI Research."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    FIRST_DENSE,
    MLP_LAYER_TYPES,
    Settings,
    Shapes,
    build,
    by_kind,
    deepseek_v3_router,
    derive_kinds,
    grouped_query,
    rotary_where_sliding,
    shared_experts,
    sizes,
    stock,
)
from jaxmoe.model.spec import DecoderSpec


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    pattern = s.take("sliding_window_pattern", None)
    if isinstance(pattern, int) and s.take("sliding_window", None) is not None:
        derive_kinds(s, lambda index: (index + 1) % pattern != 0)
    return build(
        s,
        shapes,
        router=deepseek_v3_router,
        attention=rotary_where_sliding(grouped_query(bias=False, norm="head", sliding=by_kind)),
        shared=shared_experts("num_shared_experts|n_shared_experts"),
    )


EXAONE_MOE = Family(
    model_type="exaone_moe",
    moe_layers=(MLP_LAYER_TYPES, FIRST_DENSE),
    defaults={
        **sizes(102400, 4096, 16384, layers=32, heads=32, kv_heads=32, positions=2048),
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "moe_intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    routing="deepseek_v3",
    bias="mlp.e_score_correction_bias",
    shared="mlp.shared_experts",
    decoder=_decoder,
    transformers=stock("exaone_moe", "ExaoneMoe"),
)

FAMILIES = (EXAONE_MOE,)
