"""From a checkpoint's config to the decoder's spec: one entry per architecture, said in what differs from the usual.

The usual is what most families share: RMS norms before both blocks, grouped heads with rotary positions, SiLU. Sizes of
the routed experts and which layers have them are known from the tensors. Every attribute of the config must be used or
known to be harmless (`settings.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.model.experts import ACTIVATIONS
from jaxmoe.model.rotary import mscale, rotary
from jaxmoe.model.settings import Settings
from jaxmoe.model.spec import (
    Attention,
    DecoderSpec,
    DenseBlock,
    ExpertBlock,
    Gate,
    LatentAttention,
    LayerSpec,
    Norm,
    Rotary,
    Router,
)

Shapes = Mapping[int, LayerShape]
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


def _build(
    s: Settings,
    shapes: Shapes,
    *,
    router: Callable[[Settings, int], Router],
    attention: Callable[[Settings, int, Norm], Attention | LatentAttention] | None = None,
    norm: Norm | None = None,
    gate: Gate | None = None,
    shared: int = 0,
    shared_gate: bool = False,
    expert_bias: bool = False,
    mlp_bias: bool = False,
    layer: Mapping[str, Any] | None = None,
    **ends: Any,
) -> DecoderSpec:
    """Build a decoder of the usual form; `layer` and `ends` are further arguments of `LayerSpec` and `DecoderSpec`."""
    hidden, depth = s.take("hidden_size"), s.take("num_hidden_layers")
    norm = norm or Norm(epsilon=s.take("rms_norm_eps", 1e-6))
    gate = gate or Gate(activation=s.take("hidden_act", "silu"))
    if gate.activation not in (*ACTIVATIONS, "scaled_swish"):
        raise JaxmoeError(f"config.json: activation {gate.activation!r}: jaxmoe runs {', '.join(sorted(ACTIVATIONS))}")
    intermediate = s.take("intermediate_size", 0)
    s.take("moe_intermediate_size", 0)

    def block(index: int) -> DenseBlock | ExpertBlock:
        if index not in shapes:
            return DenseBlock(intermediate=intermediate, gate=gate, bias=mlp_bias)
        return ExpertBlock(
            shape=shapes[index],
            router=router(s, index),
            gate=gate,
            bias=expert_bias,
            shared=DenseBlock(intermediate=shared, gate=gate, bias=mlp_bias) if shared else None,
            shared_gate=shared_gate,
        )

    layers = tuple(
        LayerSpec(
            hidden=hidden,
            attention=(attention or _grouped())(s, index, norm),
            feed_forward=block(index),
            norm=norm,
            **(layer or {}),
        )
        for index in range(depth)
    )
    return DecoderSpec(
        vocabulary=s.take("vocab_size"),
        hidden=hidden,
        layers=layers,
        norm=norm,
        tied=s.take("tie_word_embeddings", False),
        **ends,
    )


def _rope(s: Settings, head: int, *, interleaved: bool = False, partial: float = 1.0) -> Rotary:
    """Return the position embedding, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    parameters = {"rope_theta": s.take("rope_theta", 10000.0), **s.take("rope_parameters|rope_scaling", {})}
    share = s.take("partial_rotary_factor", None)
    share = parameters.get("partial_rotary_factor", partial if share is None else share)
    longest = s.take("max_position_embeddings", 0)
    original = s.take("original_max_position_embeddings", None)
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    elif longest:
        parameters.setdefault("original_max_position_embeddings", longest)
    size = s.take("rotary_dim", None) or int(head * share)
    return rotary(parameters, size, interleaved=interleaved, positions=longest)


def _grouped(
    *,
    bias: str | bool = "attention_bias",
    output_bias: str | bool | None = None,
    norm: str | None = None,
    norm_after_rotary: bool = False,
    interleaved: bool = False,
    partial: float = 1.0,
    sliding: Callable[[Settings, int], int | None] = lambda s, index: None,
    scale: str | None = None,
    sinks: bool = False,
):
    """Return what builds attention with grouped heads; `bias` is a name in the config or the value itself."""

    def build(s: Settings, index: int, layer_norm: Norm) -> Attention:
        heads, hidden = s.take("num_attention_heads"), s.take("hidden_size")
        head = s.take("head_dim|attention_head_dim", None) or hidden // heads
        inputs = s.take(bias, False) if isinstance(bias, str) else bias
        output = inputs if output_bias is None else output_bias
        return Attention(
            heads=heads,
            kv_heads=s.take("num_key_value_heads", heads),
            head=head,
            value=head,
            rotary=_rope(s, head, interleaved=interleaved, partial=partial),
            scale=s.take(scale) if scale else head**-0.5,
            window=sliding(s, index),
            norm=layer_norm if norm else None,
            norm_over=norm or "head",
            norm_after_rotary=norm_after_rotary,
            bias=inputs,
            output_bias=s.take(output, False) if isinstance(output, str) else output,
            sinks=sinks,
            clip=s.take("clip_qkv", None),
        )

    return build


def _latent(*, interleaved: bool | None = None):
    """Return what builds latent attention."""

    def build(s: Settings, index: int, layer_norm: Norm) -> LatentAttention:
        plain, rotated = s.take("qk_nope_head_dim"), s.take("qk_rope_head_dim")
        s.take("head_dim|qk_head_dim", None)
        s.take("num_key_value_heads", None)
        pairs = s.take("rope_interleave", True) if interleaved is None else interleaved
        rope = s.take("rope_parameters|rope_scaling", {})
        scale = (plain + rotated) ** -0.5
        if rope.get("rope_type", rope.get("type", "default")) != "default" and rope.get("mscale_all_dim"):
            scale *= mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
        return LatentAttention(
            heads=s.take("num_attention_heads"),
            query_rank=s.take("q_lora_rank", None),
            kv_rank=s.take("kv_lora_rank"),
            plain=plain,
            rotated=rotated,
            value=s.take("v_head_dim"),
            rotary=_rope(s, rotated, interleaved=pairs),
            scale=scale,
            norm=Norm(epsilon=1e-6),
            bias=s.take("attention_bias", False),
        )

    return build


def _everywhere(s: Settings, index: int) -> int | None:
    """Return the window of a family that has one in all layers or none."""
    return s.take("sliding_window", None) if s.take("use_sliding_window", True) else None


def _by_layer(s: Settings, index: int) -> int | None:
    """Return the window of a family whose config names the layers that have one."""
    window = s.take("sliding_window", None)
    kinds = s.take("layer_types", None)
    if kinds is None:
        # Without a list, the layers behind `max_window_layers` have it, where it is used at all.
        behind = index >= s.take("max_window_layers", 0)
        return window if s.take("use_sliding_window", False) and behind else None
    s.take("use_sliding_window", None)
    if len(kinds) != s.take("num_hidden_layers"):
        raise JaxmoeError(f"config.json: layer_types names {len(kinds)} layers of {s.take('num_hidden_layers')}")
    if kinds[index] not in ("full_attention", "sliding_attention"):
        raise JaxmoeError(f"layer {index} has {kinds[index]}: jaxmoe runs full_attention and sliding_attention")
    return window if kinds[index] == "sliding_attention" else None


def _softmax(*, top_k: str = "num_experts_per_tok", normalize: bool | str = False, **options: Any):
    """Return what builds a softmax router; `normalize` is a name in the config or the value itself."""

    def build(s: Settings, index: int) -> Router:
        chosen = s.take(top_k)
        return Router(
            experts=s.take("num_experts|num_local_experts|n_routed_experts|moe_num_experts"),
            top_k=chosen[index] if isinstance(chosen, list) else chosen,
            normalize=s.take(normalize, False) if isinstance(normalize, str) else normalize,
            **options,
        )

    return build


def _deepseek_v2_router(s: Settings, index: int) -> Router:
    limited = s.take("topk_method", "greedy") == "group_limited_greedy"
    s.expect("scoring_func", "softmax")
    s.take("norm_topk_prob", None)  # read by the config, never by the model
    groups, kept = s.take("n_group", 1), s.take("topk_group", 1)
    return Router(
        experts=s.take("n_routed_experts|num_experts"),
        top_k=s.take("num_experts_per_tok"),
        groups=groups if limited else 1,
        kept_groups=kept if limited else 1,
        scale=s.take("routed_scaling_factor", 1.0),
    )


def _deepseek_v3_router(s: Settings, index: int) -> Router:
    s.expect("scoring_func", "sigmoid", "noaux_tc")
    s.expect("topk_method", "noaux_tc")
    return Router(
        experts=s.take("n_routed_experts|num_experts|num_local_experts"),
        top_k=s.take("num_experts_per_tok|num_experts_per_token"),
        score="sigmoid",
        selection_bias=True,
        groups=s.take("n_group|num_expert_group", 1),
        group_score="top2",
        kept_groups=s.take("topk_group", 1),
        normalize=s.take("norm_topk_prob|moe_renormalize", True),
        epsilon=1e-20,
        scale=s.take("routed_scaling_factor", 1.0),
    )


def _mixtral(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.take("router_jitter_noise", None)
    return _build(s, shapes, router=_softmax(normalize=True), attention=_grouped(bias=False, sliding=_everywhere))


def _qwen2_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return _build(
        s,
        shapes,
        router=_softmax(normalize="norm_topk_prob"),
        attention=_grouped(bias=s.take("qkv_bias", True), output_bias=False, sliding=_by_layer),
        shared=s.take("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _qwen3_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    attention = _grouped(norm="head", sliding=_everywhere)
    return _build(s, shapes, router=_softmax(normalize="norm_topk_prob"), attention=attention)


def _olmoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return _build(s, shapes, router=_softmax(normalize="norm_topk_prob"), attention=_grouped(norm="all"))


def _flex_olmo(s: Settings, shapes: Shapes) -> DecoderSpec:
    behind = {"before": False, "after": True}
    router = _softmax(normalize="norm_topk_prob")
    return _build(s, shapes, router=router, attention=_grouped(norm="all"), layer=behind)


def _phimoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return _build(
        s,
        shapes,
        router=_softmax(score="sparse_mixer", jitter=s.take("router_jitter_noise", 0.01)),
        attention=_grouped(sliding=_everywhere),
        norm=Norm(kind="layer", epsilon=s.take("rms_norm_eps"), bias=True),
        head_bias=s.take("lm_head_bias", False),
    )


def _deepseek_v2(s: Settings, shapes: Shapes) -> DecoderSpec:
    return _build(
        s,
        shapes,
        router=_deepseek_v2_router,
        attention=_latent(interleaved=True),
        shared=s.take("n_shared_experts", 0) * s.take("moe_intermediate_size"),
        mlp_bias=s.take("mlp_bias", False),
    )


def _deepseek_v3(s: Settings, shapes: Shapes) -> DecoderSpec:
    shared = s.take("n_shared_experts", 0) * s.take("moe_intermediate_size")
    return _build(s, shapes, router=_deepseek_v3_router, attention=_latent(), shared=shared)


def _glm4_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return _build(
        s,
        shapes,
        router=_deepseek_v3_router,
        attention=_grouped(output_bias=False, norm="head" if s.take("use_qk_norm", False) else None, partial=0.5),
        shared=s.take("n_shared_experts", 0) * s.take("moe_intermediate_size"),
    )


def _dots1(s: Settings, shapes: Shapes) -> DecoderSpec:
    shared = s.take("n_shared_experts", 0) * s.take("moe_intermediate_size")
    attention = _grouped(norm="head", sliding=_by_layer)
    return _build(s, shapes, router=_deepseek_v3_router, attention=attention, shared=shared)


def _minimax_m2(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.take("router_jitter_noise", None)
    s.expect("scoring_func", "sigmoid")
    s.expect("use_qk_norm", True)
    s.expect("qk_norm_type", "per_layer")
    s.expect("use_routing_bias", True)
    s.expect("attn_type_list", [1] * s.take("num_hidden_layers"))
    s.expect("shared_intermediate_size", 0)
    router = _softmax(score="sigmoid", selection_bias=True, normalize=True)
    return _build(s, shapes, router=router, attention=_grouped(bias=False, norm="all"))


def _gpt_oss(s: Settings, shapes: Shapes) -> DecoderSpec:
    gate = Gate(
        activation="scaled_swish",
        limit=s.take("swiglu_limit", 7.0),
        alpha=s.take("swiglu_alpha", 1.702),
        offset=1.0,
    )
    s.expect("hidden_act", "silu")
    return _build(
        s,
        shapes,
        router=_softmax(top_k="num_experts_per_tok|experts_per_token", score="chosen", bias=True),
        attention=_grouped(sliding=_by_layer, sinks=True),
        gate=gate,
        expert_bias=True,
    )


def _ernie4_5_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    bias = s.take("use_bias", False)
    router = _softmax(
        top_k="moe_k|num_experts_per_tok", selection_bias=True, normalize=True, floor=s.take("moe_norm_min", 1e-12)
    )
    return _build(
        s,
        shapes,
        router=router,
        attention=_grouped(bias=bias, interleaved=True),
        shared=s.take("moe_num_shared_experts", 0) * s.take("moe_intermediate_size"),
        mlp_bias=bias,
        head_bias=bias,
    )


def _hunyuan_v1_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    for name in ("qk_norm", "use_qk_norm", "use_mixed_mlp_moe", "norm_topk_prob"):
        s.expect(name, True)
    s.expect("routed_scaling_factor", False, 1.0)
    s.expect("num_shared_expert", 1, [1] * s.take("num_hidden_layers"))
    return _build(
        s,
        shapes,
        router=_softmax(top_k="moe_topk|num_experts_per_tok", normalize=True),
        attention=_grouped(norm="head", norm_after_rotary=True),
        shared=s.take("intermediate_size"),
    )


def _granitemoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return _build(
        s,
        shapes,
        router=_softmax(score="chosen"),
        attention=_grouped(scale="attention_multiplier"),
        shared=s.take("shared_intermediate_size", 0),
        layer={"multiplier": s.take("residual_multiplier", 1.0)},
        embedding_scale=s.take("embedding_multiplier", 1.0),
        logit_scale=1 / s.take("logits_scaling", 1.0),
    )


def _bailing_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    s.take("use_bias", False)
    s.expect("router_dtype", "fp32")
    return _build(
        s,
        shapes,
        router=_softmax(normalize="norm_topk_prob"),
        attention=_grouped(bias="use_qkv_bias", output_bias="use_bias"),
        shared=s.take("num_shared_experts", 0) * s.take("moe_shared_expert_intermediate_size|moe_intermediate_size"),
        head_norm=s.take("norm_head", False),
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
}
"""What builds the spec of each architecture, by `model_type`."""
