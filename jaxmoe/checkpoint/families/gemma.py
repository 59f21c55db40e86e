"""The mixture among the Gemma 4 models of Google: read and not run."""

from dataclasses import replace

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import stock

GEMMA4_TEXT = Family(
    model_type="gemma4_text",
    experts="num_experts",
    top_k="top_k_experts",
    module="experts",
    router="router.proj.weight",
    routing="gemma4",
    shared="mlp",
    known=r"\.per_expert_scale$",
    transformers=stock("gemma4", "Gemma4", text=True),
)

FAMILIES = (GEMMA4_TEXT, replace(GEMMA4_TEXT, model_type="gemma4", transformers=None))
