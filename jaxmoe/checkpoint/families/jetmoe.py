"""JetMoE: read and not run. Its attention is a mixture too, which no method touches."""

from jaxmoe.checkpoint.families.family import Family

JETMOE = Family(
    model_type="jetmoe",
    experts="num_local_experts",
    intermediate="intermediate_size",
    module="mlp",
    router="mlp.router.layer.weight",
    routing="topk_softmax",
    known=r"\.self_attention\.experts\.",
    no_transformers="transformers keeps its experts in a module of another form",
)

FAMILIES = (JETMOE,)
