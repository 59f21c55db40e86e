"""From a checkpoint's config to the decoder's spec: one entry per architecture, said in what differs from the usual.

The parts are those of `building.py`. Sizes of the routed experts and which layers have them are known from the tensors.
Every attribute of the config must be used or known to be harmless (`settings.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jaxmoe.errors import JaxmoeError
from jaxmoe.model.building import (
    Shapes,
    build,
    by_kind,
    by_layer,
    deepseek_v2_router,
    deepseek_v3_router,
    everywhere,
    grouped,
    latent,
    rotary_where_sliding,
    sigmoid,
    softmax,
)
from jaxmoe.model.settings import Settings
from jaxmoe.model.spec import Attention, DecoderSpec, Gate, Norm

Builder = Callable[[Settings, Shapes], DecoderSpec]


def decoder_spec(config: Mapping[str, Any], shapes: Shapes) -> DecoderSpec:
    """Return what a checkpoint's decoder computes.

    Args:
        config: the part of `config.json` that describes the decoder.
        shapes: of the routed experts, by layer.

    Raises:
        JaxmoeError: the architecture is not one that jaxmoe runs, or an attribute is neither handled nor known to be
            harmless; all of them are listed.
    """
    model_type = str(config.get("model_type"))
    if model_type not in BUILDERS:
        raise JaxmoeError(
            f"model_type {model_type!r}: jaxmoe runs {', '.join(sorted(BUILDERS))}; statistics of others can be"
            " gathered through PyTorch (`jaxmoe.torch.statistics`)"
        )
    given = {name: value for name, value in config.items() if value is not None}
    settings = Settings({**DEFAULTS.get(model_type, {}), **given})
    spec = BUILDERS[model_type](settings, shapes)
    settings.finish()
    return spec


def _mixtral(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.take("router_jitter_noise", None)
    return build(s, shapes, router=softmax(normalize=True), attention=grouped(bias=False, sliding=everywhere))


def _qwen2_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=softmax(normalize="norm_topk_prob"),
        attention=grouped(bias=s.take("qkv_bias", True), output_bias=False, sliding=by_layer),
        shared=s.take("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _qwen3_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    attention = grouped(norm="head", sliding=everywhere)
    return build(s, shapes, router=softmax(normalize="norm_topk_prob"), attention=attention)


def _olmoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(s, shapes, router=softmax(normalize="norm_topk_prob"), attention=grouped(norm="all"))


def _flex_olmo(s: Settings, shapes: Shapes) -> DecoderSpec:
    behind = {"before": False, "after": True}
    router = softmax(normalize="norm_topk_prob")
    return build(s, shapes, router=router, attention=grouped(norm="all"), layer=behind)


def _phimoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=softmax(score="sparse_mixer", jitter=s.take("router_jitter_noise", 0.01)),
        attention=grouped(sliding=everywhere),
        norm=Norm(kind="layer", epsilon=s.take("rms_norm_eps"), bias=True),
        head_bias=s.take("lm_head_bias", False),
    )


def _deepseek_v2(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=deepseek_v2_router,
        attention=latent(interleaved=True),
        shared=s.take("n_shared_experts", 0) * s.take("moe_intermediate_size"),
        mlp_bias=s.take("mlp_bias", False),
    )


def _deepseek_v3(s: Settings, shapes: Shapes) -> DecoderSpec:
    shared = s.take("n_shared_experts", 0) * s.take("moe_intermediate_size")
    return build(s, shapes, router=deepseek_v3_router, attention=latent(), shared=shared)


def _glm4_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=deepseek_v3_router,
        attention=grouped(output_bias=False, norm="head" if s.take("use_qk_norm", False) else None, partial=0.5),
        shared=s.take("n_shared_experts", 0) * s.take("moe_intermediate_size"),
    )


def _dots1(s: Settings, shapes: Shapes) -> DecoderSpec:
    shared = s.take("n_shared_experts", 0) * s.take("moe_intermediate_size")
    attention = grouped(norm="head", sliding=by_layer)
    return build(s, shapes, router=deepseek_v3_router, attention=attention, shared=shared)


def _minimax_m2(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.take("router_jitter_noise", None)
    s.expect("scoring_func", "sigmoid")
    s.expect("use_qk_norm", True)
    s.expect("qk_norm_type", "per_layer")
    s.expect("use_routing_bias", True)
    s.expect("attn_type_list", [1] * s.take("num_hidden_layers"))
    s.expect("shared_intermediate_size", 0)
    router = softmax(score="sigmoid", selection_bias=True, normalize=True)
    return build(s, shapes, router=router, attention=grouped(bias=False, norm="all"))


def _gpt_oss(s: Settings, shapes: Shapes) -> DecoderSpec:
    gate = Gate(
        activation="scaled_swish",
        limit=s.take("swiglu_limit", 7.0),
        alpha=s.take("swiglu_alpha", 1.702),
        offset=1.0,
    )
    s.expect("hidden_act", "silu")
    return build(
        s,
        shapes,
        router=softmax(top_k="num_experts_per_tok|experts_per_token", score="chosen", bias=True),
        attention=grouped(sliding=by_kind, sinks=True),
        gate=gate,
        expert_bias=True,
    )


def _ernie4_5_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    bias = s.take("use_bias", False)
    router = softmax(
        top_k="moe_k|num_experts_per_tok", selection_bias=True, normalize=True, floor=s.take("moe_norm_min", 1e-12)
    )
    return build(
        s,
        shapes,
        router=router,
        attention=grouped(bias=bias, interleaved=True),
        shared=s.take("moe_num_shared_experts", 0) * s.take("moe_intermediate_size"),
        mlp_bias=bias,
        head_bias=bias,
    )


def _hunyuan_v1_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    for name in ("qk_norm", "use_qk_norm", "use_mixed_mlp_moe", "norm_topk_prob"):
        s.expect(name, True)
    s.expect("routed_scaling_factor", False, 1.0)
    s.expect("num_shared_expert", 1, [1] * s.take("num_hidden_layers"))
    return build(
        s,
        shapes,
        router=softmax(top_k="moe_topk|num_experts_per_tok", normalize=True),
        attention=grouped(norm="head", norm_after_rotary=True),
        shared=s.take("intermediate_size"),
    )


def _granitemoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=softmax(score="chosen"),
        attention=grouped(scale="attention_multiplier"),
        shared=s.take("shared_intermediate_size", 0),
        layer={"multiplier": s.take("residual_multiplier", 1.0)},
        embedding_scale=s.take("embedding_multiplier", 1.0),
        logit_scale=1 / s.take("logits_scaling", 1.0),
    )


def _bailing_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.take("use_bias", False)
    s.expect("router_dtype", "fp32")
    return build(
        s,
        shapes,
        router=softmax(normalize="norm_topk_prob"),
        attention=grouped(bias="use_qkv_bias", output_bias="use_bias"),
        shared=s.take("num_shared_experts", 0) * s.take("moe_shared_expert_intermediate_size|moe_intermediate_size"),
        head_norm=s.take("norm_head", False),
    )


def _solar_open(s: Settings, shapes: Shapes) -> DecoderSpec:
    shared = s.take("n_shared_experts", 0) * s.take("moe_intermediate_size")
    return build(s, shapes, router=deepseek_v3_router, attention=grouped(output_bias=False), shared=shared)


def _exaone_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=deepseek_v3_router,
        attention=rotary_where_sliding(grouped(bias=False, norm="head", sliding=by_kind)),
        shared=s.take("num_shared_experts|n_shared_experts", 0) * s.take("moe_intermediate_size"),
    )


def _hy_v3(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=sigmoid(scale="router_scaling_factor"),
        attention=grouped(norm="head"),
        shared=s.take("num_shared_experts", 0) * s.take("moe_intermediate_size"),
        mlp_bias=s.take("mlp_bias", False),
    )


def _afmoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.expect("score_func", "sigmoid")
    s.expect("route_norm", True)
    for groups in ("n_group", "topk_group", "num_expert_groups", "num_limited_groups"):
        s.expect(groups, 1)
    return build(
        s,
        shapes,
        router=sigmoid(scale="route_scale"),
        attention=rotary_where_sliding(grouped(norm="head", sliding=by_kind, gated=True)),
        shared=s.take("num_shared_experts", 0) * s.take("moe_intermediate_size"),
        layer={"after": True},
        embedding_scale=s.take("hidden_size") ** 0.5 if s.take("mup_enabled", False) else 1.0,
    )


def _mimo_v2_flash(s: Settings, shapes: Shapes) -> DecoderSpec:
    value, value_scale = s.take("v_head_dim"), s.take("attention_value_scale", 1.0)

    def attention(s: Settings, index: int, norm: Norm) -> Attention:
        built = grouped(output_bias=False, sliding=by_kind)(s, index, norm)
        built = replace(built, value=value, value_scale=value_scale)
        # Layers with a window have twice the key-value heads, and sinks.
        return replace(built, kv_heads=2 * built.kv_heads, sinks=True) if built.window else built

    return build(s, shapes, router=deepseek_v3_router, attention=attention)


def _cohere2_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    chosen = s.take("expert_selection_fn", "softmax")
    if chosen not in ("softmax", "sigmoid"):
        raise JaxmoeError(f"config.json: expert_selection_fn {chosen!r}: jaxmoe computes softmax and sigmoid")
    of_sigmoids = s.take("norm_topk_prob", True)
    router = softmax(score="chosen") if chosen == "softmax" else softmax(score="sigmoid", normalize=of_sigmoids)
    joined = s.take("shared_expert_combination_strategy", "average")
    if joined not in ("sum", "average"):
        raise JaxmoeError(
            f"config.json: shared_expert_combination_strategy {joined!r}: jaxmoe computes sum and average"
        )
    shared = s.take("num_shared_experts", 0) * s.take("intermediate_size")
    rms, epsilon = s.take("rms_norm_eps", None), s.take("layer_norm_eps", 1e-5)
    everywhere_rotated = s.take("prefix_dense_sliding_window_pattern", 1) == 1

    def attention(s: Settings, index: int, norm: Norm) -> Attention:
        built = grouped(sliding=by_kind, interleaved=True)(s, index, norm)
        rotated = built.window or (index not in shapes and everywhere_rotated)
        return built if rotated else replace(built, rotary=None)

    return build(
        s,
        shapes,
        router=router,
        attention=attention,
        norm=Norm(kind="layer", epsilon=epsilon) if rms is None else Norm(epsilon=rms),
        shared=shared,
        scale=0.5 if shared and joined == "average" else 1.0,
        dense="prefix_dense_intermediate_size",
        layer={"parallel": True},
        logit_scale=s.take("logit_scale", 0.0625),
    )


_DEEPSEEK_V3 = {"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "olmoe": {"rms_norm_eps": 1e-5},
    "flex_olmo": {"rope_theta": 5e5},
    "phimoe": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "glm4_moe": {"rms_norm_eps": 1e-5, "norm_topk_prob": True},
    "dots1": {"norm_topk_prob": False},
    "minimax_m2": {"rope_theta": 5e6},
    "gpt_oss": {
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
    },
    "ernie4_5_moe": {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    "hunyuan_v1_moe": {"rms_norm_eps": 1e-5},
    "qwen3_moe": {"use_sliding_window": False},
    "glm4_moe_lite": {"rms_norm_eps": 1e-5, "norm_topk_prob": True, "routed_scaling_factor": 1.8},
    "solar_open": {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "norm_topk_prob": True},
    "exaone_moe": {"rms_norm_eps": 1e-5, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "hy_v3": {"rope_theta": 11158840.0, "rms_norm_eps": 1e-5, "router_scaling_factor": 2.826},
    "afmoe": {"rms_norm_eps": 1e-5},
    "mimo_v2_flash": {"rms_norm_eps": 1e-5, "norm_topk_prob": True, "attention_value_scale": 0.707},
    "cohere2_moe": {"tie_word_embeddings": True},
}
"""What a config means where it says nothing, as far as it differs from the usual and tensors do not tell."""

BUILDERS: dict[str, Builder] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "flex_olmo": _flex_olmo,
    "phimoe": _phimoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "dots1": _dots1,
    "minimax_m2": _minimax_m2,
    "gpt_oss": _gpt_oss,
    "ernie4_5_moe": _ernie4_5_moe,
    "hunyuan_v1_moe": _hunyuan_v1_moe,
    "granitemoe": _granitemoe,
    "granitemoeshared": _granitemoe,
    "bailing_moe": _bailing_moe,
    "glm4_moe_lite": _deepseek_v3,
    "solar_open": _solar_open,
    "exaone_moe": _exaone_moe,
    "hy_v3": _hy_v3,
    "afmoe": _afmoe,
    "mimo_v2_flash": _mimo_v2_flash,
    "cohere2_moe": _cohere2_moe,
}
"""What builds the spec of each architecture, by `model_type`."""
