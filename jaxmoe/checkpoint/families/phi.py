"""Phi-3.5-MoE of Microsoft."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    FLAG,
    Settings,
    Shapes,
    build,
    everywhere,
    grouped_query,
    rope_parameters,
    rope_type,
    sizes,
    softmax,
    stock,
)
from jaxmoe.checkpoint.families.parts.keys import brief
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import DecoderSpec, Norm


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
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
        attention=grouped_query(sliding=everywhere),
        norm=Norm(kind="layer", epsilon=s.take("rms_norm_eps"), bias=True),
        head_bias=s.take("lm_head_bias"),
    )


PHIMOE = Family(
    model_type="phimoe",
    experts="num_local_experts",
    intermediate="intermediate_size",
    defaults={
        **sizes(32064, 4096, 6400, layers=32, heads=32, kv_heads=8, positions=131072),
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2,
        "num_local_experts": 16,
        "router_jitter_noise": 0.01,
        "lm_head_bias": False,
    },
    kinds={"lm_head_bias": FLAG},
    router="block_sparse_moe.gate.weight",
    routing="sparse_mixer",
    decoder=_decoder,
    transformers=stock("phimoe", "Phimoe"),
)

FAMILIES = (PHIMOE,)
