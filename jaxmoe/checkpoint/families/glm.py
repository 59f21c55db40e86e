"""GLM-4.5 to 4.7 of Z.ai, and 4.7-Flash (`lite`) with latent attention; GLM-5 (`dsa`) is read and not run."""

from dataclasses import replace

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    FIRST_DENSE,
    MLP_LAYER_TYPES,
    Settings,
    Shapes,
    build,
    deepseek_v3_router,
    grouped_query,
    latent,
    shared_experts,
    sizes,
    stock,
)
from jaxmoe.model.spec import DecoderSpec


def _glm4_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=deepseek_v3_router,
        attention=grouped_query(output_bias=False, norm="head" if s.take("use_qk_norm") else None, partial=0.5),
        shared=shared_experts("n_shared_experts"),
    )


def _glm4_moe_lite(s: Settings, shapes: Shapes) -> DecoderSpec:
    attention = latent(rotated_size="qk_rope_head_dim|head_dim")
    return build(s, shapes, router=deepseek_v3_router, attention=attention, shared=shared_experts("n_shared_experts"))


GLM4_MOE = Family(
    model_type="glm4_moe",
    experts="n_routed_experts",
    moe_layers=(MLP_LAYER_TYPES, FIRST_DENSE),
    defaults={
        **sizes(151552, 4096, 10944, layers=46, heads=96, kv_heads=8, positions=131072),
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "norm_topk_prob": True,
        "use_qk_norm": False,
    },
    routing="deepseek_v3",
    bias="mlp.gate.e_score_correction_bias",
    shared="mlp.shared_experts",
    decoder=_glm4_moe,
    transformers=stock("glm4_moe", "Glm4Moe"),
)

GLM4_MOE_LITE = replace(
    GLM4_MOE,
    model_type="glm4_moe_lite",
    defaults={
        **sizes(154880, 2048, 10240, layers=47, heads=20, kv_heads=20, positions=202752),
        "rms_norm_eps": 1e-5,
        "kv_lora_rank": 512,
        "q_lora_rank": 768,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "moe_intermediate_size": 1536,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
    },
    decoder=_glm4_moe_lite,
    transformers=stock("glm4_moe_lite", "Glm4MoeLite"),
)

GLM_MOE_DSA = replace(
    GLM4_MOE, model_type="glm_moe_dsa", defaults={}, decoder=None, transformers=stock("glm_moe_dsa", "GlmMoeDsa")
)

FAMILIES = (GLM4_MOE, GLM4_MOE_LITE, GLM_MOE_DSA)
