"""Cohere2 MoE."""

from dataclasses import replace

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    EPSILON,
    FIRST_DENSE,
    MLP_LAYER_TYPES,
    NUMBER,
    PERIOD,
    SIZES,
    WORD,
    Settings,
    Shapes,
    build,
    by_kind,
    derive_kinds,
    grouped_query,
    shared_experts,
    sizes,
    softmax,
    stock,
)
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import Attention, DecoderSpec, Norm


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    for name in ("rope_scaling", "partial_rotary_factor"):
        if s.take(name, None):
            raise JaxmoeError(
                f"config.json: transformers' class of cohere2_moe does not read {name}: say it in rope_parameters, or"
                " take it out if it is not meant"
            )
    chosen = s.take("expert_selection_fn")
    if chosen not in ("softmax", "sigmoid"):
        raise JaxmoeError(f"config.json: expert_selection_fn {chosen!r}: jaxmoe computes softmax and sigmoid")
    of_sigmoids = s.take("norm_topk_prob")
    router = softmax(score="chosen") if chosen == "softmax" else softmax(score="sigmoid", normalize=of_sigmoids)
    joined = s.take("shared_expert_combination_strategy")
    if joined not in ("sum", "average"):
        raise JaxmoeError(
            f"config.json: shared_expert_combination_strategy {joined!r}: jaxmoe computes sum and average"
        )
    shared = s.take("num_shared_experts")
    rms, epsilon = s.take("rms_norm_eps", None), s.take("layer_norm_eps")
    pattern, first = s.take("prefix_dense_sliding_window_pattern"), s.take("first_k_dense_replace", 0)
    others = s.take("sliding_window_pattern")
    if isinstance(others, int):
        # The dense layers at the beginning have a pattern of their own.
        derive_kinds(s, lambda index: ((index + 1) % pattern if index < first else (index - first + 1) % others) != 0)

    def attention(s: Settings, index: int, norm: Norm) -> Attention:
        built = grouped_query(sliding=by_kind, interleaved=True)(s, index, norm)
        rotated = built.window or (index not in shapes and pattern == 1)
        return built if rotated else replace(built, rotary=None)

    return build(
        s,
        shapes,
        router=router,
        attention=attention,
        norm=Norm(kind="layer", epsilon=epsilon) if rms is None else Norm(epsilon=rms),
        shared=shared_experts("num_shared_experts", "intermediate_size"),
        scale=0.5 if shared and joined == "average" else 1.0,
        dense="prefix_dense_intermediate_size",
        layer={"parallel": True},
        logit_scale=s.take("logit_scale"),
    )


COHERE2_MOE = Family(
    model_type="cohere2_moe",
    # Its config has one size for dense and for expert layers.
    intermediate="moe_intermediate_size|intermediate_size",
    moe_layers=(MLP_LAYER_TYPES, FIRST_DENSE),
    defaults={
        **sizes(256000, 8192, 22528, layers=40, heads=64, positions=8192),
        "layer_norm_eps": 1e-5,
        # The norm with a mean, unless this is given.
        "rms_norm_eps": None,
        "logit_scale": 0.0625,
        "tie_word_embeddings": True,
        "head_dim": 128,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "prefix_dense_sliding_window_pattern": 1,
        "num_experts_per_tok": 2,
        "num_experts": 8,
        "num_shared_experts": 0,
        "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
    },
    kinds={
        "layer_norm_eps": EPSILON,
        "logit_scale": NUMBER,
        "prefix_dense_intermediate_size": SIZES,
        "prefix_dense_sliding_window_pattern": PERIOD,
        "shared_expert_combination_strategy": WORD,
        "expert_selection_fn": WORD,
    },
    routing="topk_softmax",
    shared="mlp.shared_experts",
    decoder=_decoder,
    transformers=stock("cohere2_moe", "Cohere2Moe"),
)

FAMILIES = (COHERE2_MOE,)
