"""Solar Open of Upstage."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    Settings,
    Shapes,
    build,
    deepseek_v3_router,
    grouped_query,
    shared_experts,
    sizes,
    stock,
)
from jaxmoe.model.spec import DecoderSpec


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    shared = shared_experts("n_shared_experts")
    return build(s, shapes, router=deepseek_v3_router, attention=grouped_query(output_bias=False), shared=shared)


SOLAR_OPEN = Family(
    model_type="solar_open",
    experts="n_routed_experts",
    defaults={
        **sizes(196608, 4096, None, layers=48, heads=64, kv_heads=8, positions=131072),
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "moe_intermediate_size": 1280,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "norm_topk_prob": True,
    },
    routing="deepseek_v3",
    bias="mlp.gate.e_score_correction_bias",
    shared="mlp.shared_experts",
    decoder=_decoder,
    transformers=stock("solar_open", "SolarOpen"),
)

FAMILIES = (SOLAR_OPEN,)
