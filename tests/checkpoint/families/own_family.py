"""An architecture from outside the package: one file with its record, as `--import` takes it."""

from jaxmoe.checkpoint.families import Family, TransformersClasses, register
from jaxmoe.checkpoint.families.parts import POSITIVE, Settings, Shapes, build, grouped_query, sizes, softmax
from jaxmoe.model.spec import DecoderSpec


def decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    attention = grouped_query(norm="head", scale="score_scale")
    return build(s, shapes, router=softmax(normalize="norm_topk_prob"), attention=attention)


OWN = register(
    Family(
        model_type="own_moe",
        defaults={
            **sizes(151936, 2048, 6144, layers=24, heads=32, kv_heads=4, positions=32768),
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "score_scale": 0.5,
        },
        kinds={"score_scale": POSITIVE},
        harmless="own_seed decoder_sparse_step",
        neutral={"own_form": (1,)},
        renamed=("blocks.", "layers."),
        projections={"wi": "gate", "wu": "up", "wo": "down"},
        names={
            "embedding": "model.tokens",
            "layer": "model.blocks.{index}.",
            "attention.query_norm": "self_attn.query_norm",
            "attention.key_norm": "self_attn.key_norm",
        },
        decoder=decoder,
        transformers=TransformersClasses(
            "own_classes", "own_classes", config="OwnConfig", base="OwnModel", causal="OwnForCausalLM"
        ),
    )
)
