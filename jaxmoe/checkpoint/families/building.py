"""What specs are built from: the usual layer, attention and routers, with what families say differently as arguments.

The usual is what most families share: RMS norms before both blocks, grouped heads with rotary positions, SiLU. A part
of a spec is a function of the settings and the layer's index; every attribute of the config that it reads is accounted
for there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxmoe.checkpoint.families.rotary import mscale, rope_type, rotary
from jaxmoe.checkpoint.families.settings import Settings
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.model.experts import ACTIVATIONS
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
ATTENTION_KINDS = ("full_attention", "sliding_attention")
LARGEST_HEAD = 4096
"""Numbers of a head, far beyond any model: a config that leads to more is damaged."""

EXPERTS = "num_experts|num_local_experts|n_routed_experts|moe_num_experts"
TOP_K = "num_experts_per_tok|num_experts_per_token"


def build(
    s: Settings,
    shapes: Shapes,
    *,
    router: Callable[[Settings, int], Router],
    attention: Callable[[Settings, int, Norm], Attention | LatentAttention] | None = None,
    norm: Norm | None = None,
    gate: Gate | None = None,
    shared: Callable[[Settings, int], int] | None = None,
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
        shared: gives the size of a layer's shared experts together; None without.
        shared_gate: whether a sigmoid scales them.
        scale: of what all experts of a layer give.
        expert_bias: whether routed experts have biases.
        mlp_bias: whether the other networks have.
        dense: key of the size of layers without experts.
        layer: further arguments of `LayerSpec`.
        ends: further arguments of `DecoderSpec`.

    Raises:
        JaxmoeError: the config lacks something, says what jaxmoe does not compute, or contradicts itself or the shapes.
    """
    hidden, depth = s.take("hidden_size"), s.take("num_hidden_layers")
    norm = norm or Norm(epsilon=s.take("rms_norm_eps"))
    gate = gate or Gate(activation=s.take("hidden_act"))
    if gate.activation not in (*ACTIVATIONS, "scaled_swish"):
        raise JaxmoeError(f"config.json: activation {gate.activation!r}: jaxmoe runs {', '.join(sorted(ACTIVATIONS))}")
    # Where all layers have experts, these are keys that nothing is computed with.
    for name in ("intermediate_size", "moe_intermediate_size"):
        s.take(name, None)

    def block(index: int) -> DenseBlock | ExpertBlock:
        if index not in shapes:
            return DenseBlock(intermediate=s.of_layer(dense, index), gate=gate, bias=mlp_bias)
        beside = shared(s, index) if shared else 0
        return ExpertBlock(
            shape=shapes[index],
            router=checked(router(s, index), shapes[index], index),
            gate=gate,
            bias=expert_bias,
            shared=DenseBlock(intermediate=beside, gate=gate, bias=mlp_bias) if beside else None,
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
        tied=s.take("tie_word_embeddings"),
        **ends,
    )


def checked(router: Router, shape: LayerShape, index: int) -> Router:
    """Return a layer's router; raise if it cannot choose among the experts that the tensors hold."""
    experts, groups = router.experts, router.groups
    problem = ""
    if experts != shape.experts:
        problem = f"{experts} experts, by config.json or by the default of its model_type, and the tensors hold"
        problem += f" {shape.experts}"
    elif router.score == "sparse_mixer" and router.top_k != 2:
        problem = f"a token chooses {router.top_k} experts, and a sparse mixer has two picks"
    elif router.top_k > experts:
        problem = f"a token chooses {router.top_k} of {experts} experts"
    elif experts % groups or router.kept_groups > groups:
        problem = f"{experts} experts in {groups} groups, of which {router.kept_groups} are chosen from"
    elif router.top_k > router.kept_groups * (experts // groups):
        problem = f"a token chooses {router.top_k} experts, and {router.kept_groups} of {groups} groups have fewer"
    elif router.group_score == "top2" and groups > 1 and experts // groups < 2:
        problem = f"groups are scored by their two best experts, and {groups} groups of {experts} have one each"
    if problem:
        raise JaxmoeError(f"config.json: layer {index}: {problem}: mend the numbers")
    return router


def shared_experts(count: str, size: str = "moe_intermediate_size"):
    """Return what gives the size of a layer's shared experts together: how many, times the size of one."""

    def total(s: Settings, index: int) -> int:
        number = s.of_layer(count, index, 0)
        return number and number * s.of_layer(size, index)

    return total


def rope_parameters(s: Settings, index: int, *, partial: float = 1.0) -> dict[str, Any]:
    """Return what a layer's positions are computed from, put together as transformers does.

    The older `rope_scaling` replaces `rope_parameters` altogether; `rope_theta` and `partial_rotary_factor` beside them
    count where they are silent. Either may be nested by the kind of attention.
    """
    older, newer = s.take("rope_scaling", None), s.take("rope_parameters", None)
    given = older or newer or s.defaults.get("rope_parameters") or {}
    nested = [kind for kind in given if isinstance(given[kind], Mapping)]
    if nested:
        kind = kind_of(s, index, ATTENTION_KINDS)
        if kind not in nested:
            raise JaxmoeError(f"config.json: rope_parameters says nothing of {kind}, which layer {index} has")
        given = given[kind]
    beside = {
        "rope_theta": s.take("rope_theta"),
        "partial_rotary_factor": s.take("partial_rotary_factor", partial),
        "original_max_position_embeddings": s.take("max_position_embeddings"),
    }
    said = {name: value for name, value in given.items() if value is not None}
    original = s.take("original_max_position_embeddings", None)
    if original is not None and not nested:
        said["original_max_position_embeddings"] = original
    return {**beside, **said}


def rope(s: Settings, index: int, head: int, *, interleaved: bool = False, partial: float = 1.0) -> Rotary:
    """Return a layer's position embedding."""
    parameters = rope_parameters(s, index, partial=partial)
    return rotary(parameters, head, interleaved=interleaved, positions=s.take("max_position_embeddings"))


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
        heads, head = s.take("num_attention_heads"), head_size(s)
        groups = s.take("num_key_value_heads", None) or heads
        if heads % groups:
            raise JaxmoeError(f"config.json: {heads} attention heads cannot share {groups} key-value heads evenly")
        inputs = s.take(bias) if isinstance(bias, str) else bias
        output = inputs if output_bias is None else output_bias
        return Attention(
            heads=heads,
            kv_heads=groups,
            head=head,
            value=head,
            rotary=rope(s, index, head, interleaved=interleaved, partial=partial),
            scale=s.take(scale) if scale else head**-0.5,
            window=sliding(s, index),
            norm=layer_norm if norm else None,
            norm_over=norm or "head",
            norm_after_rotary=norm_after_rotary,
            bias=inputs,
            output_bias=s.take(output) if isinstance(output, str) else output,
            sinks=sinks,
            gated=gated,
            clip=s.take("clip_qkv", None),
        )

    return make


def latent(*, interleaved: bool | None = None, rotated_size: str = "qk_rope_head_dim"):
    """Return what builds latent attention; `rotated_size` is the config's name of the numbers with position."""

    def make(s: Settings, index: int, layer_norm: Norm) -> LatentAttention:
        plain, rotated = s.take("qk_nope_head_dim"), s.take(rotated_size)
        # Names of sizes that follow from those two, and of one that nothing is computed with.
        for name in ("head_dim", "qk_head_dim", "num_key_value_heads"):
            s.take(name, None)
        pairs = s.take("rope_interleave") if interleaved is None else interleaved
        rotation = rope(s, index, rotated, interleaved=pairs)
        scale = (plain + rotated) ** -0.5
        parameters = rope_parameters(s, index)
        if rope_type(parameters) != "default" and parameters.get("mscale_all_dim"):
            if "factor" not in parameters:
                raise JaxmoeError("config.json: mscale_all_dim needs the factor that positions are stretched by")
            scale *= mscale(parameters["factor"], parameters["mscale_all_dim"]) ** 2
        return LatentAttention(
            heads=s.take("num_attention_heads"),
            query_rank=s.take("q_lora_rank", None),
            kv_rank=s.take("kv_lora_rank"),
            plain=plain,
            rotated=rotated,
            value=s.take("v_head_dim"),
            rotary=rotation,
            scale=scale,
            norm=Norm(epsilon=1e-6),
            bias=s.take("attention_bias"),
        )

    return make


def head_size(s: Settings) -> int:
    """Return the numbers of a head: given, or the hidden size divided among the heads."""
    heads, hidden = s.take("num_attention_heads"), s.take("hidden_size")
    given = s.take("head_dim|attention_head_dim", None)
    head = hidden // heads if given is None else given
    if not 1 <= head <= LARGEST_HEAD:
        raise JaxmoeError(f"config.json: {heads} attention heads of {head} numbers: no model has such; mend the sizes")
    return head


def everywhere(s: Settings, index: int) -> int | None:
    """Return the window of a family that has one in all layers or none."""
    window = s.take("sliding_window", None)
    return None if window is None else open_window(window)


def where_used(s: Settings, index: int) -> int | None:
    """Return the window of a family whose config has a switch for it."""
    used = s.take("use_sliding_window")
    s.take("sliding_window", None)
    return everywhere(s, index) if used else None


def by_kind(s: Settings, index: int) -> int | None:
    """Return the window of a family whose config names the layers that have one."""
    window = s.take("sliding_window", None)
    if kind_of(s, index, ATTENTION_KINDS) != "sliding_attention":
        return None
    if window is None:
        raise JaxmoeError(f"config.json: layer {index} has a sliding window, and sliding_window is null")
    return open_window(window)


def derive_kinds(s: Settings, slides: Callable[[int], bool]) -> None:
    """Fill in `layer_types`, where the config does not name them, by what tells whether a layer has a window."""
    depth = s.take("num_hidden_layers")
    s.derive("layer_types", ["sliding_attention" if slides(index) else "full_attention" for index in range(depth)])


def open_window(size: int) -> int:
    """Return the size of a window; raise if a token would not see even itself."""
    if size < 1:
        raise JaxmoeError("config.json: sliding_window is 0, so that no token would see any: give null for no window")
    return size


def kind_of(s: Settings, index: int, known: Sequence[str]) -> str:
    """Return the kind of a layer's attention, one of those that are known."""
    kinds, depth = s.take("layer_types"), s.take("num_hidden_layers")
    if len(kinds) != depth:
        raise JaxmoeError(f"config.json: layer_types names {len(kinds)} layers of {depth}")
    # What transformers called it in some versions.
    kind = "full_attention" if kinds[index] == "attention" else kinds[index]
    if kind not in known:
        raise JaxmoeError(f"config.json: layer {index} has {kind}, which is none of {', '.join(known)}")
    return kind


def rotary_where_sliding(attention: Callable[[Settings, int, Norm], Attention]):
    """Return what builds attention whose positions count only in the layers that have a window, if any has."""

    def make(s: Settings, index: int, layer_norm: Norm) -> Attention:
        built = attention(s, index, layer_norm)
        return built if built.window or not s.take("sliding_window", None) else replace(built, rotary=None)

    return make


def softmax(*, top_k: str = TOP_K, normalize: bool | str = False, **options: Any):
    """Return what builds a softmax router; `normalize` is a name in the config or the value itself."""

    def make(s: Settings, index: int) -> Router:
        return Router(
            experts=s.of_layer(EXPERTS, index),
            top_k=s.of_layer(top_k, index),
            normalize=s.take(normalize) if isinstance(normalize, str) else normalize,
            **options,
        )

    return make


def sigmoid(*, scale: str):
    """Return what builds a sigmoid router with a selection bias; `scale` is the config's name of the factor."""

    def make(s: Settings, index: int) -> Router:
        options = {"selection_bias": True, "normalize": True, "epsilon": 1e-20, "scale": s.take(scale)}
        return softmax(score="sigmoid", **options)(s, index)

    return make


def deepseek_v2_router(s: Settings, index: int) -> Router:
    limited = s.take("topk_method") == "group_limited_greedy"
    s.expect("topk_method", "greedy", "group_limited_greedy")
    s.expect("scoring_func", "softmax")
    s.take("norm_topk_prob")  # read by the config, never by the model
    groups, kept = s.take("n_group", None), s.take("topk_group", None)
    if limited and (groups is None or kept is None):
        raise JaxmoeError("config.json: topk_method group_limited_greedy needs n_group and topk_group")
    return Router(
        experts=s.of_layer(EXPERTS, index),
        top_k=s.of_layer(TOP_K, index),
        groups=groups if limited else 1,
        kept_groups=kept if limited else 1,
        scale=s.take("routed_scaling_factor"),
    )


def deepseek_v3_router(s: Settings, index: int) -> Router:
    s.expect("scoring_func", "sigmoid", "noaux_tc")
    s.expect("topk_method", "noaux_tc")
    return Router(
        experts=s.of_layer(EXPERTS, index),
        top_k=s.of_layer(TOP_K, index),
        score="sigmoid",
        selection_bias=True,
        groups=s.take("n_group|num_expert_group"),
        group_score="top2",
        kept_groups=s.take("topk_group"),
        normalize=s.take("norm_topk_prob|moe_renormalize"),
        epsilon=1e-20,
        scale=s.take("routed_scaling_factor"),
    )
