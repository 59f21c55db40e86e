"""AFMoE: Trinity of Arcee AI."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    FLAG,
    NUM_DENSE_LAYERS,
    NUMBER,
    SIZE,
    WORD,
    Settings,
    Shapes,
    build,
    by_kind,
    derive_kinds,
    grouped_query,
    rotary_where_sliding,
    shared_experts,
    sigmoid,
    sizes,
    stock,
)
from jaxmoe.model.spec import DecoderSpec


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.expect("score_func", "sigmoid")
    s.expect("route_norm", True)
    for groups in ("n_group", "topk_group", "num_expert_groups", "num_limited_groups"):
        s.expect(groups, 1)
    pattern = s.take("global_attn_every_n_layers")
    derive_kinds(s, lambda index: (index + 1) % pattern != 0)
    return build(
        s,
        shapes,
        router=sigmoid(scale="route_scale"),
        attention=rotary_where_sliding(grouped_query(norm="head", sliding=by_kind, gated=True)),
        shared=shared_experts("num_shared_experts"),
        layer={"after": True},
        embedding_scale=s.take("hidden_size") ** 0.5 if s.take("mup_enabled") else 1.0,
    )


AFMOE = Family(
    model_type="afmoe",
    moe_layers=(NUM_DENSE_LAYERS,),
    defaults={
        **sizes(200192, 2048, 6144, layers=32, heads=16, positions=16384),
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "moe_intermediate_size": 1408,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "num_shared_experts": 2,
        "route_scale": 1.0,
        "global_attn_every_n_layers": 4,
        "sliding_window": 1024,
        "mup_enabled": False,
    },
    kinds={
        "score_func": WORD,
        "route_norm": FLAG,
        "route_scale": NUMBER,
        "num_expert_groups": SIZE,
        "num_limited_groups": SIZE,
        "mup_enabled": FLAG,
    },
    harmless="load_balance_coeff use_grouped_mm",
    router="mlp.router.gate.weight",
    routing="sigmoid_bias",
    bias="mlp.expert_bias",
    shared="mlp.shared_experts",
    names={
        "input_norm_after": "post_attention_layernorm",
        "post_norm": "pre_mlp_layernorm",
        "post_norm_after": "post_mlp_layernorm",
    },
    decoder=_decoder,
    transformers=stock("afmoe", "Afmoe"),
)

FAMILIES = (AFMOE,)
