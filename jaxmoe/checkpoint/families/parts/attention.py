"""Attention as configs describe it: with grouped heads, and latent."""

from collections.abc import Callable

from jaxmoe.checkpoint.families.parts.rotary import mscale, rope, rope_parameters, rope_type
from jaxmoe.checkpoint.families.parts.settings import Settings
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import Attention, LatentAttention, Norm

LARGEST_HEAD = 4096
"""Numbers of a head, far beyond any model: a config that leads to more is damaged."""


def grouped_query(
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
