"""MiniMax-M2, and MiniMax-Text-01, whose attention is linear, which is read and not run."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    COUNT,
    FEW,
    FLAG,
    WORD,
    ZERO_OR_ONE,
    Settings,
    Shapes,
    build,
    grouped_query,
    head_size,
    sizes,
    softmax,
    stock,
)
from jaxmoe.model.spec import DecoderSpec


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.take("router_jitter_noise", None)
    s.expect("scoring_func", "sigmoid")
    s.expect("use_qk_norm", True)
    s.expect("qk_norm_type", "per_layer")
    s.expect("use_routing_bias", True)
    s.expect("attn_type_list", [1] * s.take("num_hidden_layers"))
    s.expect("shared_intermediate_size", 0)
    router = softmax(score="sigmoid", selection_bias=True, normalize=True)
    rotated = s.take("rotary_dim", None)
    partial = 1.0 if rotated is None else rotated / head_size(s)
    return build(s, shapes, router=router, attention=grouped_query(bias=False, norm="all", partial=partial))


MINIMAX = Family(
    model_type="minimax",
    experts="num_local_experts",
    intermediate="intermediate_size",
    router="block_sparse_moe.gate.weight",
    routing="softmax_normalised",
    transformers=stock("minimax", "MiniMax"),
)

MINIMAX_M2 = Family(
    model_type="minimax_m2",
    experts="num_local_experts",
    intermediate="intermediate_size",
    defaults={
        **sizes(200064, 3072, 1536, layers=62, heads=48, kv_heads=8, positions=196608),
        "rope_theta": 5e6,
        "head_dim": 128,
        "num_experts_per_tok": 8,
        "num_local_experts": 256,
    },
    kinds={
        "rotary_dim": FEW,
        "shared_intermediate_size": COUNT,
        "use_routing_bias": FLAG,
        "qk_norm_type": WORD,
        "attn_type_list": ZERO_OR_ONE,
    },
    harmless="mlp_intermediate_size shared_moe_mode",
    # As MiniMax-Text-01 has them, where they scale what goes past a block.
    neutral={
        f"layernorm_{block}_{factor}": (1.0,)
        for block in ("full_attention", "linear_attention", "mlp")
        for factor in ("alpha", "beta")
    },
    router="block_sparse_moe.gate.weight",
    routing="sigmoid_bias",
    bias="block_sparse_moe.e_score_correction_bias",
    decoder=_decoder,
    transformers=stock("minimax_m2", "MiniMaxM2"),
)

FAMILIES = (MINIMAX, MINIMAX_M2)
