"""OLMoE and FlexOlmo of the Allen Institute for AI."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import Settings, Shapes, build, grouped_query, sizes, softmax, stock
from jaxmoe.model.spec import DecoderSpec


def _olmoe(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(s, shapes, router=softmax(normalize="norm_topk_prob"), attention=grouped_query(norm="all"))


def _flex_olmo(s: Settings, shapes: Shapes) -> DecoderSpec:
    behind = {"before": False, "after": True}
    router = softmax(normalize="norm_topk_prob")
    return build(s, shapes, router=router, attention=grouped_query(norm="all"), layer=behind)


OLMOE = Family(
    model_type="olmoe",
    intermediate="intermediate_size",
    defaults={
        **sizes(50304, 2048, 2048, layers=16, heads=16, positions=4096),
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "num_experts": 64,
    },
    decoder=_olmoe,
    transformers=stock("olmoe", "Olmoe"),
)

FLEX_OLMO = Family(
    model_type="flex_olmo",
    intermediate="intermediate_size",
    defaults={
        **sizes(100352, 4096, 11008, layers=32, heads=32, positions=4096),
        "rope_theta": 5e5,
        "num_experts_per_tok": 5,
        "num_experts": 7,
    },
    names={"input_norm": "post_attention_layernorm", "post_norm": "post_feedforward_layernorm"},
    decoder=_flex_olmo,
    transformers=stock("flex_olmo", "FlexOlmo"),
)

FAMILIES = (OLMOE, FLEX_OLMO)
