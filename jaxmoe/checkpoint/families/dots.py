"""dots.llm1 of rednote."""

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
    shared_experts,
    sizes,
    stock,
)
from jaxmoe.model.spec import DecoderSpec


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    window, first = s.take("sliding_window", None), s.take("max_window_layers")
    derive_kinds(s, lambda index: window is not None and index >= first)
    shared = shared_experts("n_shared_experts")
    attention = grouped_query(norm="head", sliding=by_kind)
    return build(s, shapes, router=deepseek_v3_router, attention=attention, shared=shared)


DOTS1 = Family(
    model_type="dots1",
    experts="n_routed_experts",
    moe_layers=(MLP_LAYER_TYPES, FIRST_DENSE),
    defaults={
        **sizes(152064, 4608, 10944, layers=62, heads=32, kv_heads=32, positions=2048),
        "moe_intermediate_size": 1408,
        "sliding_window": 4096,
        "max_window_layers": 62,
    },
    routing="deepseek_v3",
    bias="mlp.gate.e_score_correction_bias",
    shared="mlp.shared_experts",
    decoder=_decoder,
    transformers=stock("dots1", "Dots1"),
)

FAMILIES = (DOTS1,)
