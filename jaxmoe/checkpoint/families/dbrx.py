"""DBRX of Databricks: read and not run."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import MAPPING, SIZE

DBRX = Family(
    model_type="dbrx",
    experts="ffn_config.moe_num_experts",
    top_k="ffn_config.moe_top_k",
    intermediate="ffn_config.ffn_hidden_size",
    hidden="d_model",
    kinds={"ffn_config": MAPPING, "d_model": SIZE},
    module="ffn.experts.mlp",
    router="ffn.router.layer.weight",
    routing="dbrx",
    no_transformers="transformers keeps its experts in a module of another form",
)

FAMILIES = (DBRX,)
