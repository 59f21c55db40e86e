"""Nemotron-H of NVIDIA, with Mamba, attention and mixtures as layers of their own: read and not run."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import SIZE, Rule, stock

NEMOTRON_H = Family(
    model_type="nemotron_h",
    experts="n_routed_experts",
    # With a latent size, the experts work between two projections that all of them share.
    hidden="moe_latent_size|hidden_size",
    moe_layers=(
        Rule(("layers_block_type",), lambda config, layer: config["layers_block_type"][layer] == "moe"),
        Rule(("hybrid_override_pattern",), lambda config, layer: config["hybrid_override_pattern"][layer] == "E"),
    ),
    kinds={"moe_latent_size": SIZE},
    module="mixer.experts",
    renamed=("backbone.", "model."),
    router="mixer.gate.weight",
    routing="deepseek_v3",
    bias="mixer.gate.e_score_correction_bias",
    shared="mixer.shared_experts",
    gated=False,
    transformers=stock("nemotron_h", "NemotronH"),
)

FAMILIES = (NEMOTRON_H,)
