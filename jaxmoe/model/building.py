"""What specs are built from: the usual layer, attention and routers, with what families say differently as arguments.

The usual is what most families share: RMS norms before both blocks, grouped heads with rotary positions, SiLU. A part
of a spec is a function of the settings and the layer's index; every attribute of the config that it reads is accounted
for there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
KINDS = ("full_attention", "sliding_attention")


def build(
    s: Settings,
    shapes: Shapes,
    *,
    router: Callable[[Settings, int], Router],
    attention: Callable[[Settings, int, Norm], Attention | LatentAttention] | None = None,
    norm: Norm | None = None,
    gate: Gate | None = None,
    shared: int = 0,
    shared_gate: bool = False,
    scale: float = 1.0,
    expert_bias: bool = False,
    mlp_bias: bool = False,
    dense: str = "intermediate_size",
    layer: Mapping[str, Any] | None = None,
    **ends: Any,
) -> DecoderSpec:
    """Build a decoder of the usual form.

    Args:
        s: the settings.
        shapes: of the routed experts, by layer.
        router: makes the router of a layer.
        attention: makes the attention of a layer.
        norm: of the layers and the end.
        gate: of all feed-forward networks.
        shared: size of the shared experts together, 0 without.
        shared_gate: whether a sigmoid scales them.
        scale: of what all experts of a layer give.
        expert_bias: whether routed experts have biases.
        mlp_bias: whether the other networks have.
        dense: key of the size of layers without experts.
        layer: further arguments of `LayerSpec`.
        ends: further arguments of `DecoderSpec`.
    """
    hidden, depth = s.take("hidden_size"), s.take("num_hidden_layers")
    norm = norm or Norm(epsilon=s.take("rms_norm_eps", 1e-6))
    gate = gate or Gate(activation=s.take("hidden_act", "silu"))
    if gate.activation not in (*ACTIVATIONS, "scaled_swish"):
        raise JaxmoeError(f"config.json: activation {gate.activation!r}: jaxmoe runs {', '.join(sorted(ACTIVATIONS))}")
    intermediate = s.take(dense, 0)
    s.take("intermediate_size|moe_intermediate_size", 0)

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
            scale=scale,
        )

    layers = tuple(
        LayerSpec(
            hidden=hidden,
            attention=(attention or grouped())(s, index, norm),
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


def rope(s: Settings, index: int, head: int, *, interleaved: bool = False, partial: float = 1.0) -> Rotary:
    """Return a layer's position embedding, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    given = s.take("rope_parameters|rope_scaling", {})
    if nested := [kind for kind in given if isinstance(given[kind], Mapping)]:
        given = given[kind_of(s, index, nested)]
    parameters = {"rope_theta": s.take("rope_theta", 10000.0), **given}
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


def grouped(
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
    gated: bool = False,
):
    """Return what builds attention with grouped heads; `bias` is a name in the config or the value itself."""

    def make(s: Settings, index: int, layer_norm: Norm) -> Attention:
        heads, hidden = s.take("num_attention_heads"), s.take("hidden_size")
        head = s.take("head_dim|attention_head_dim", None) or hidden // heads
        inputs = s.take(bias, False) if isinstance(bias, str) else bias
        output = inputs if output_bias is None else output_bias
        return Attention(
            heads=heads,
            kv_heads=s.take("num_key_value_heads", heads),
            head=head,
            value=head,
            rotary=rope(s, index, head, interleaved=interleaved, partial=partial),
            scale=s.take(scale) if scale else head**-0.5,
            window=sliding(s, index),
            norm=layer_norm if norm else None,
            norm_over=norm or "head",
            norm_after_rotary=norm_after_rotary,
            bias=inputs,
            output_bias=s.take(output, False) if isinstance(output, str) else output,
            sinks=sinks,
            gated=gated,
            clip=s.take("clip_qkv", None),
        )

    return make


def latent(*, interleaved: bool | None = None):
    """Return what builds latent attention."""

    def make(s: Settings, index: int, layer_norm: Norm) -> LatentAttention:
        plain, rotated = s.take("qk_nope_head_dim"), s.take("qk_rope_head_dim")
        s.take("head_dim|qk_head_dim", None)
        s.take("num_key_value_heads", None)
        pairs = s.take("rope_interleave", True) if interleaved is None else interleaved
        scaling = s.take("rope_parameters|rope_scaling", {})
        scale = (plain + rotated) ** -0.5
        if scaling.get("rope_type", scaling.get("type", "default")) != "default" and scaling.get("mscale_all_dim"):
            scale *= mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
        return LatentAttention(
            heads=s.take("num_attention_heads"),
            query_rank=s.take("q_lora_rank", None),
            kv_rank=s.take("kv_lora_rank"),
            plain=plain,
            rotated=rotated,
            value=s.take("v_head_dim"),
            rotary=rope(s, index, rotated, interleaved=pairs),
            scale=scale,
            norm=Norm(epsilon=1e-6),
            bias=s.take("attention_bias", False),
        )

    return make


def everywhere(s: Settings, index: int) -> int | None:
    """Return the window of a family that has one in all layers or none."""
    return s.take("sliding_window", None) if s.take("use_sliding_window", True) else None


def by_layer(s: Settings, index: int) -> int | None:
    """Return the window of a family whose config may name the layers that have one, or how many have none."""
    if s.take("layer_types", None) is not None:
        s.take("use_sliding_window", None)
        return by_kind(s, index)
    window, first = s.take("sliding_window", None), s.take("max_window_layers", 0)
    return window if s.take("use_sliding_window", False) and index >= first else None


def by_kind(s: Settings, index: int) -> int | None:
    """Return the window of a family whose config must name the layers that have one."""
    window = s.take("sliding_window", None)
    return window if kind_of(s, index, KINDS) == "sliding_attention" else None


def kind_of(s: Settings, index: int, known: Sequence[str]) -> str:
    """Return the kind of a layer's attention, one of those that are known."""
    kinds, depth = s.take("layer_types"), s.take("num_hidden_layers")
    if len(kinds) != depth:
        raise JaxmoeError(f"config.json: layer_types names {len(kinds)} layers of {depth}")
    if kinds[index] not in known:
        raise JaxmoeError(f"config.json: layer {index} has {kinds[index]}, which is none of {', '.join(known)}")
    return kinds[index]


def rotary_where_sliding(attention: Callable[[Settings, int, Norm], Attention]):
    """Return what builds attention whose positions count only in the layers that have a window, if any has."""

    def make(s: Settings, index: int, layer_norm: Norm) -> Attention:
        built = attention(s, index, layer_norm)
        return built if built.window or not s.take("sliding_window", None) else replace(built, rotary=None)

    return make


def softmax(*, top_k: str = "num_experts_per_tok", normalize: bool | str = False, **options: Any):
    """Return what builds a softmax router; `normalize` is a name in the config or the value itself."""

    def make(s: Settings, index: int) -> Router:
        chosen = s.take(top_k)
        return Router(
            experts=s.take("num_experts|num_local_experts|n_routed_experts|moe_num_experts"),
            top_k=chosen[index] if isinstance(chosen, list) else chosen,
            normalize=s.take(normalize, False) if isinstance(normalize, str) else normalize,
            **options,
        )

    return make


def sigmoid(*, scale: str):
    """Return what builds a sigmoid router with a selection bias; `scale` is the config's name of the factor."""

    def make(s: Settings, index: int) -> Router:
        options = {"selection_bias": True, "normalize": True, "epsilon": 1e-20, "scale": s.take(scale, 1.0)}
        return softmax(score="sigmoid", **options)(s, index)

    return make


def deepseek_v2_router(s: Settings, index: int) -> Router:
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


def deepseek_v3_router(s: Settings, index: int) -> Router:
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
