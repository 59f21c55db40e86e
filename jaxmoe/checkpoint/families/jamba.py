"""Jamba of AI21, with Mamba layers beside attention: read and not run."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import LAYER, PERIOD, Rule, stock

JAMBA = Family(
    model_type="jamba",
    experts="num_experts",
    intermediate="intermediate_size",
    moe_layers=(
        Rule(
            ("expert_layer_period", "expert_layer_offset"),
            lambda config, layer: layer % config["expert_layer_period"] == config["expert_layer_offset"],
        ),
    ),
    kinds={"expert_layer_period": PERIOD, "expert_layer_offset": LAYER},
    module="feed_forward.experts",
    router="feed_forward.router.weight",
    transformers=stock("jamba", "Jamba"),
)

FAMILIES = (JAMBA,)
