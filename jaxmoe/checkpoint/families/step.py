"""Step 3.5 and 3.7 of StepFun: read and not run."""

from dataclasses import replace

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import MLP_LAYER_TYPES

STEP3P5 = Family(
    model_type="step3p5",
    experts="n_routed_experts|moe_num_experts",
    moe_layers=(MLP_LAYER_TYPES,),
    module="moe.experts",
    router="moe.gate.weight",
    routing="sigmoid_bias",
    bias="moe.router_bias",
    shared="share_expert",
    known=r"\.share_expert\.",
)

FAMILIES = (STEP3P5, replace(STEP3P5, model_type="step3p7"))
