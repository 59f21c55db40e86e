"""Granite of IBM, without and with shared experts; the hybrid with Mamba layers is read and not run."""

from dataclasses import replace

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    COUNT,
    NUMBER,
    POSITIVE,
    Settings,
    Shapes,
    build,
    grouped_query,
    sizes,
    softmax,
    stock,
)
from jaxmoe.model.spec import DecoderSpec


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=softmax(score="chosen"),
        attention=grouped_query(scale="attention_multiplier"),
        shared=lambda s, index: s.take("shared_intermediate_size"),
        layer={"multiplier": s.take("residual_multiplier")},
        embedding_scale=s.take("embedding_multiplier"),
        logit_scale=1 / s.take("logits_scaling"),
    )


GRANITEMOE = Family(
    model_type="granitemoe",
    experts="num_local_experts",
    intermediate="intermediate_size",
    defaults={
        **sizes(32000, 4096, 11008, layers=32, heads=32, positions=2048),
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 0,
    },
    kinds={
        "embedding_multiplier": NUMBER,
        "logits_scaling": POSITIVE,
        "residual_multiplier": NUMBER,
        "attention_multiplier": POSITIVE,
        "shared_intermediate_size": COUNT,
    },
    module="block_sparse_moe.experts",
    router="block_sparse_moe.router.layer.weight",
    routing="topk_softmax",
    shared="shared_mlp",
    decoder=_decoder,
    transformers=stock("granitemoe", "GraniteMoe"),
)

GRANITEMOESHARED = replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    names={
        "shared.gate": "{shared}.input_linear[gate]",
        "shared.up": "{shared}.input_linear[up]",
        "shared.down": "{shared}.output_linear",
    },
    transformers=stock("granitemoeshared", "GraniteMoeShared"),
)

GRANITEMOEHYBRID = replace(
    GRANITEMOE,
    model_type="granitemoehybrid",
    decoder=None,
    transformers=stock("granitemoehybrid", "GraniteMoeHybrid"),
)

FAMILIES = (GRANITEMOE, GRANITEMOESHARED, GRANITEMOEHYBRID)
