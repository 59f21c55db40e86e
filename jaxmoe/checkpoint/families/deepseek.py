"""DeepSeek-MoE, and DeepSeek-V2 and V3 with latent attention; V3.2, whose attention is sparse, is read and not run."""

from dataclasses import replace

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    EXPERTS,
    FIRST_DENSE,
    MLP_LAYER_TYPES,
    TOP_K,
    Settings,
    Shapes,
    build,
    deepseek_v3_router,
    latent,
    shared_experts,
    sizes,
    softmax,
    stock,
)
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import DecoderSpec, Router

_LATENT = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}


def _deepseek(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.expect("scoring_func", "softmax")
    router = softmax(normalize="norm_topk_prob", epsilon=1e-20)
    return build(s, shapes, router=router, shared=shared_experts("n_shared_experts"))


def _deepseek_v2(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=_deepseek_v2_router,
        attention=latent(interleaved=True),
        shared=shared_experts("n_shared_experts"),
        mlp_bias=s.take("mlp_bias"),
    )


def _deepseek_v2_router(s: Settings, index: int) -> Router:
    limited = s.take("topk_method") == "group_limited_greedy"
    s.expect("topk_method", "greedy", "group_limited_greedy")
    s.expect("scoring_func", "softmax")
    s.take("norm_topk_prob")  # read by the config, never by the model
    groups, kept = s.take("n_group", None), s.take("topk_group", None)
    if limited and (groups is None or kept is None):
        raise JaxmoeError("config.json: topk_method group_limited_greedy needs n_group and topk_group")
    return Router(
        experts=s.of_layer(EXPERTS, index),
        top_k=s.of_layer(TOP_K, index),
        groups=groups if limited else 1,
        kept_groups=kept if limited else 1,
        scale=s.take("routed_scaling_factor"),
    )


def _deepseek_v3(s: Settings, shapes: Shapes) -> DecoderSpec:
    shared = shared_experts("n_shared_experts")
    return build(s, shapes, router=deepseek_v3_router, attention=latent(), shared=shared)


DEEPSEEK = Family(
    model_type="deepseek",
    experts="n_routed_experts",
    moe_layers=(FIRST_DENSE,),
    defaults={
        **sizes(102400, 4096, 11008, layers=30, heads=32, positions=2048),
        "moe_intermediate_size": 1407,
    },
    shared="mlp.shared_experts",
    decoder=_deepseek,
)

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    experts="n_routed_experts",
    moe_layers=(FIRST_DENSE,),
    defaults={
        **sizes(102400, 4096, 11008, layers=32, heads=32, positions=2048),
        **_LATENT,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "topk_method": "greedy",
        # Here without groups of experts.
        "n_group": None,
        "topk_group": None,
    },
    routing="deepseek_v2",
    shared="mlp.shared_experts",
    decoder=_deepseek_v2,
    transformers=stock("deepseek_v2", "DeepseekV2"),
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    experts="n_routed_experts",
    moe_layers=(MLP_LAYER_TYPES, FIRST_DENSE),
    defaults={
        **sizes(129280, 7168, 18432, layers=61, heads=128, kv_heads=128, positions=4096),
        **_LATENT,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    routing="deepseek_v3",
    bias="mlp.gate.e_score_correction_bias",
    shared="mlp.shared_experts",
    decoder=_deepseek_v3,
    transformers=stock("deepseek_v3", "DeepseekV3"),
)

DEEPSEEK_V32 = replace(
    DEEPSEEK_V3, model_type="deepseek_v32", decoder=None, transformers=stock("deepseek_v32", "DeepseekV32")
)

FAMILIES = (DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32)
