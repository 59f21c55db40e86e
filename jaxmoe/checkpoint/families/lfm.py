"""LFM2-MoE of Liquid AI, with convolutions beside attention: read and not run."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import NUM_DENSE_LAYERS, stock

LFM2_MOE = Family(
    model_type="lfm2_moe",
    moe_layers=(NUM_DENSE_LAYERS,),
    module="feed_forward.experts",
    router="feed_forward.gate.weight",
    routing="sigmoid_lfm",
    bias="feed_forward.expert_bias",
    transformers=stock("lfm2_moe", "Lfm2Moe"),
)

FAMILIES = (LFM2_MOE,)
