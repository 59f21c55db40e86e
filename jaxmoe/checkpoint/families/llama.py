"""Llama 4 of Meta: read and not run."""

from dataclasses import replace

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import LAYERS, PERIOD, Rule

LLAMA4_TEXT = Family(
    model_type="llama4_text",
    experts="num_local_experts",
    intermediate="intermediate_size",
    moe_layers=(
        Rule(("moe_layers",), lambda config, layer: layer in config["moe_layers"]),
        Rule(
            ("interleave_moe_layer_step",),
            lambda config, layer: (layer + 1) % config["interleave_moe_layer_step"] == 0,
        ),
    ),
    kinds={"moe_layers": LAYERS, "interleave_moe_layer_step": PERIOD},
    module="feed_forward.experts",
    router="feed_forward.router.weight",
    routing="llama4",
    shared="feed_forward.shared_expert",
    transposed=True,
    no_transformers="its router scales the experts' input and every expert runs on every token",
)

FAMILIES = (LLAMA4_TEXT, replace(LLAMA4_TEXT, model_type="llama4"))
