"""MiMo-V2-Flash of Xiaomi."""

from dataclasses import replace

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    ATTENTION_KINDS,
    MLP_LAYER_TYPES,
    POSITIVE,
    WINDOW,
    Rule,
    Settings,
    Shapes,
    build,
    by_kind,
    deepseek_v3_router,
    derive_kinds,
    grouped_query,
    sizes,
    stock,
)
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import Attention, DecoderSpec, Norm

_FREQUENCY = Rule(("moe_layer_freq",), lambda config, layer: bool(config["moe_layer_freq"][layer]))


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
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
        built = grouped_query(output_bias=False, sliding=by_kind)(s, index, norm)
        built = replace(built, value=value, value_scale=value_scale)
        # Layers with a window have twice the key-value heads, and sinks.
        return replace(built, kv_heads=2 * built.kv_heads, sinks=True) if built.window else built

    return build(s, shapes, router=deepseek_v3_router, attention=attention)


MIMO_V2_FLASH = Family(
    model_type="mimo_v2_flash",
    experts="n_routed_experts",
    moe_layers=(MLP_LAYER_TYPES, _FREQUENCY),
    defaults={
        **sizes(152576, 4096, 16384, layers=48, heads=64, kv_heads=4, positions=131072),
        "rope_parameters": {
            "full_attention": {"rope_theta": 5e6, "partial_rotary_factor": 0.334},
            "sliding_attention": {"rope_theta": 1e4, "partial_rotary_factor": 0.334},
        },
        "rms_norm_eps": 1e-5,
        "head_dim": 192,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "n_routed_experts": 256,
        "norm_topk_prob": True,
        "sliding_window": 129,
        "attention_value_scale": 0.707,
    },
    kinds={"sliding_window_size": WINDOW, "attention_value_scale": POSITIVE},
    routing="deepseek_v3",
    bias="mlp.gate.e_score_correction_bias",
    names={"attention.sinks": "self_attn.attention_sink_bias"},
    decoder=_decoder,
    transformers=stock("mimo_v2_flash", "MiMoV2Flash"),
)

FAMILIES = (MIMO_V2_FLASH,)
