"""From a checkpoint's config to the decoder's spec: one entry per architecture, said in what differs from the usual.

The parts are those of `building.py`. Sizes of the routed experts and which layers have them are known from the tensors.
Every attribute of the config must be used or known to be harmless (`settings.py`).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxmoe.checkpoint.families.building import (
    ATTENTION_KINDS,
    Shapes,
    build,
    by_kind,
    deepseek_v2_router,
    deepseek_v3_router,
    derive_kinds,
    everywhere,
    grouped,
    head_size,
    latent,
    rope_parameters,
    rotary_where_sliding,
    shared_experts,
    sigmoid,
    softmax,
    where_used,
)
from jaxmoe.checkpoint.families.defaults import DEFAULTS
from jaxmoe.checkpoint.families.keys import brief
from jaxmoe.checkpoint.families.rotary import rope_type
from jaxmoe.checkpoint.families.settings import Settings
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import Attention, DecoderSpec, Gate, Norm

Builder = Callable[[Settings, Shapes], DecoderSpec]


def decoder_spec(config: Mapping[str, Any], shapes: Shapes, ignored: Collection[str] = ()) -> DecoderSpec:
    """Return what a checkpoint's decoder computes.

    Args:
        config: the part of `config.json` that describes the decoder.
        shapes: of the routed experts, by layer.
        ignored: keys of the config to leave out of account, where jaxmoe does not know what they mean.

    Raises:
        JaxmoeError: the architecture is not one that jaxmoe runs, values are of the wrong kind or contradict one
            another, or an attribute is neither handled nor known to be harmless; all of them are listed.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in BUILDERS:
        raise JaxmoeError(
            f"model_type {brief(model_type)}: jaxmoe runs {', '.join(sorted(BUILDERS))}; statistics of others can be"
            " gathered through PyTorch (`jaxmoe.torch.statistics`)"
        )
    settings = Settings(config, DEFAULTS[model_type], ignored)
    spec = BUILDERS[model_type](settings, shapes)
    settings.finish()
    return spec


def _mixtral(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.take("router_jitter_noise", None)  # of training alone
    return build(s, shapes, router=softmax(normalize=True), attention=grouped(bias=False, sliding=everywhere))


def _qwen2_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    used, first = s.take("use_sliding_window"), s.take("max_window_layers")
    derive_kinds(s, lambda index: used and index % 2 == 0 and index < first)
    return build(
        s,
        shapes,
        router=softmax(normalize="norm_topk_prob"),
        attention=grouped(bias="qkv_bias", output_bias=False, sliding=by_kind),
        shared=lambda s, index: s.take("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _qwen3_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    attention = grouped(norm="head", sliding=where_used)
    return build(s, shapes, router=softmax(normalize="norm_topk_prob"), attention=attention)


def _olmoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(s, shapes, router=softmax(normalize="norm_topk_prob"), attention=grouped(norm="all"))


def _flex_olmo(s: Settings, shapes: Shapes) -> DecoderSpec:
    behind = {"before": False, "after": True}
    router = softmax(normalize="norm_topk_prob")
    return build(s, shapes, router=router, attention=grouped(norm="all"), layer=behind)


def _phimoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    positions = rope_parameters(s, 0)
    kind = rope_type(positions)
    if kind != "default" and not (kind == "longrope" and {"short_mscale", "long_mscale"} <= positions.keys()):
        raise JaxmoeError(
            f"config.json: rope_type {brief(kind)}: phimoe has longrope with short_mscale and long_mscale"
        )
    return build(
        s,
        shapes,
        router=softmax(score="sparse_mixer", jitter=s.take("router_jitter_noise")),
        attention=grouped(sliding=everywhere),
        norm=Norm(kind="layer", epsilon=s.take("rms_norm_eps"), bias=True),
        head_bias=s.take("lm_head_bias"),
    )


def _deepseek_v2(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=deepseek_v2_router,
        attention=latent(interleaved=True),
        shared=shared_experts("n_shared_experts"),
        mlp_bias=s.take("mlp_bias"),
    )


def _deepseek_v3(s: Settings, shapes: Shapes) -> DecoderSpec:
    shared = shared_experts("n_shared_experts")
    return build(s, shapes, router=deepseek_v3_router, attention=latent(), shared=shared)


def _glm4_moe_lite(s: Settings, shapes: Shapes) -> DecoderSpec:
    attention = latent(rotated_size="qk_rope_head_dim|head_dim")
    return build(s, shapes, router=deepseek_v3_router, attention=attention, shared=shared_experts("n_shared_experts"))


def _glm4_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=deepseek_v3_router,
        attention=grouped(output_bias=False, norm="head" if s.take("use_qk_norm") else None, partial=0.5),
        shared=shared_experts("n_shared_experts"),
    )


def _dots1(s: Settings, shapes: Shapes) -> DecoderSpec:
    window, first = s.take("sliding_window", None), s.take("max_window_layers")
    derive_kinds(s, lambda index: window is not None and index >= first)
    shared = shared_experts("n_shared_experts")
    attention = grouped(norm="head", sliding=by_kind)
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
    rotated = s.take("rotary_dim", None)
    partial = 1.0 if rotated is None else rotated / head_size(s)
    return build(s, shapes, router=router, attention=grouped(bias=False, norm="all", partial=partial))


def _gpt_oss(s: Settings, shapes: Shapes) -> DecoderSpec:
    gate = Gate(
        activation="scaled_swish",
        limit=s.take("swiglu_limit"),
        alpha=s.take("swiglu_alpha"),
        offset=1.0,
    )
    s.expect("hidden_act", "silu")
    derive_kinds(s, lambda index: index % 2 == 0)
    return build(
        s,
        shapes,
        router=softmax(top_k="num_experts_per_tok|experts_per_token", score="chosen", bias=True),
        attention=grouped(sliding=by_kind, sinks=True),
        gate=gate,
        expert_bias=True,
    )


def _ernie4_5_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    bias = s.take("use_bias")
    router = softmax(
        top_k="moe_k|num_experts_per_tok", selection_bias=True, normalize=True, floor=s.take("moe_norm_min")
    )
    return build(
        s,
        shapes,
        router=router,
        attention=grouped(bias=bias, interleaved=True),
        shared=shared_experts("moe_num_shared_experts"),
        mlp_bias=bias,
        head_bias=bias,
    )


def _hunyuan_v1_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    for name in ("qk_norm", "use_qk_norm", "use_mixed_mlp_moe", "norm_topk_prob"):
        s.expect(name, True)
    s.expect("routed_scaling_factor", False, 1.0)

    def shared(s: Settings, index: int) -> int:
        # The size of one is that of the routed experts, for which the config has two names.
        return s.of_layer("num_shared_expert", index, 1) * shapes[index].intermediate

    return build(
        s,
        shapes,
        router=softmax(top_k="moe_topk|num_experts_per_tok", normalize=True),
        attention=grouped(norm="head", norm_after_rotary=True),
        shared=shared,
    )


def _granitemoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=softmax(score="chosen"),
        attention=grouped(scale="attention_multiplier"),
        shared=lambda s, index: s.take("shared_intermediate_size"),
        layer={"multiplier": s.take("residual_multiplier")},
        embedding_scale=s.take("embedding_multiplier"),
        logit_scale=1 / s.take("logits_scaling"),
    )


def _deepseek(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.expect("scoring_func", "softmax")
    router = softmax(normalize="norm_topk_prob", epsilon=1e-20)
    return build(s, shapes, router=router, attention=grouped(), shared=shared_experts("n_shared_experts"))


def _bailing_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    if s.take("score_function", None) == "sigmoid":
        raise JaxmoeError(
            "config.json: this is Ling 2 (BailingMoeV2), which chooses experts by sigmoids with a bias, in groups:"
            " jaxmoe runs Ling 1 under this model_type; methods that need the weights alone work, and statistics can be"
            " gathered through PyTorch (`jaxmoe.torch.statistics`)"
        )
    s.expect("score_function", "softmax")
    s.expect("router_dtype", "fp32")
    own = "moe_shared_expert_intermediate_size" if s.take("moe_shared_expert_intermediate_size", None) else ""
    return build(
        s,
        shapes,
        router=softmax(normalize="norm_topk_prob"),
        attention=grouped(bias="use_qkv_bias", output_bias="use_bias"),
        shared=shared_experts("num_shared_experts", own or "moe_intermediate_size"),
        head_norm=s.take("norm_head"),
    )


def _solar_open(s: Settings, shapes: Shapes) -> DecoderSpec:
    shared = shared_experts("n_shared_experts")
    return build(s, shapes, router=deepseek_v3_router, attention=grouped(output_bias=False), shared=shared)


def _exaone_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    pattern = s.take("sliding_window_pattern", None)
    if isinstance(pattern, int) and s.take("sliding_window", None) is not None:
        derive_kinds(s, lambda index: (index + 1) % pattern != 0)
    return build(
        s,
        shapes,
        router=deepseek_v3_router,
        attention=rotary_where_sliding(grouped(bias=False, norm="head", sliding=by_kind)),
        shared=shared_experts("num_shared_experts|n_shared_experts"),
    )


def _hy_v3(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=sigmoid(scale="router_scaling_factor"),
        attention=grouped(norm="head"),
        shared=shared_experts("num_shared_experts"),
        mlp_bias=s.take("mlp_bias"),
    )


def _afmoe(s: Settings, shapes: Shapes) -> DecoderSpec:
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
        attention=rotary_where_sliding(grouped(norm="head", sliding=by_kind, gated=True)),
        shared=shared_experts("num_shared_experts"),
        layer={"after": True},
        embedding_scale=s.take("hidden_size") ** 0.5 if s.take("mup_enabled") else 1.0,
    )


def _mimo_v2_flash(s: Settings, shapes: Shapes) -> DecoderSpec:
    value, value_scale = s.take("v_head_dim"), s.take("attention_value_scale")
    before = s.take("sliding_window_size", None)
    if before is not None:
        # The publisher's key counts the tokens before a token, and goes before the other one.
        s.config["sliding_window"] = before + 1
    derive_kinds(s, lambda index: index > 0 and (index + 1) % 6 != 0)
    positions = s.take("rope_scaling", None) or s.take("rope_parameters", None) or {}
    if positions and not any(kind in positions for kind in ATTENTION_KINDS):
        raise JaxmoeError("config.json: mimo_v2_flash needs rope_parameters for each kind of attention (layer_types)")

    def attention(s: Settings, index: int, norm: Norm) -> Attention:
        built = grouped(output_bias=False, sliding=by_kind)(s, index, norm)
        built = replace(built, value=value, value_scale=value_scale)
        # Layers with a window have twice the key-value heads, and sinks.
        return replace(built, kv_heads=2 * built.kv_heads, sinks=True) if built.window else built

    return build(s, shapes, router=deepseek_v3_router, attention=attention)


def _cohere2_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
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
        built = grouped(sliding=by_kind, interleaved=True)(s, index, norm)
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
    "deepseek": _deepseek,
    "glm4_moe_lite": _glm4_moe_lite,
    "solar_open": _solar_open,
    "exaone_moe": _exaone_moe,
    "hy_v3": _hy_v3,
    "afmoe": _afmoe,
    "mimo_v2_flash": _mimo_v2_flash,
    "cohere2_moe": _cohere2_moe,
}
"""What builds the spec of each architecture, by `model_type`."""
