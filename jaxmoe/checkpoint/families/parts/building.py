"""A decoder of the usual form, with what architectures say differently as arguments.

The usual is what most architectures share: RMS norms before both blocks, grouped heads with rotary positions, SiLU. A
part of a spec is a function of the settings and the layer's index; every attribute of the config that it reads is
accounted for there.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.checkpoint.families.parts.attention import grouped_query
from jaxmoe.checkpoint.families.parts.routers import checked
from jaxmoe.checkpoint.families.parts.settings import Settings
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
    Router,
)

Shapes = Mapping[int, LayerShape]
"""Of the routed experts, by layer."""


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
            attention=(attention or grouped_query())(s, index, norm),
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


def shared_experts(count: str, size: str = "moe_intermediate_size"):
    """Return what gives the size of a layer's shared experts together: how many, times the size of one."""

    def total(s: Settings, index: int) -> int:
        number = s.of_layer(count, index, 0)
        return number and number * s.of_layer(size, index)

    return total
