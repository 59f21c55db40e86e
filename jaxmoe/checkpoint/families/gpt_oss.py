"""gpt-oss of OpenAI."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    POSITIVE,
    SIZES,
    Settings,
    Shapes,
    build,
    by_kind,
    derive_kinds,
    grouped_query,
    sizes,
    softmax,
    stock,
)
from jaxmoe.model.spec import DecoderSpec, Gate


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    gate = Gate(
        activation="scaled_swish",
        limit=s.take("swiglu_limit"),
        alpha=s.take("swiglu_alpha"),
        offset=1.0,
    )
    s.expect("hidden_act", "silu")
    derive_kinds(s, lambda index: index % 2 == 0)
    return build(
        s,
        shapes,
        router=softmax(top_k="num_experts_per_tok|experts_per_token", score="chosen", bias=True),
        attention=grouped_query(sliding=by_kind, sinks=True),
        gate=gate,
        expert_bias=True,
    )


GPT_OSS = Family(
    model_type="gpt_oss",
    experts="num_local_experts",
    intermediate="intermediate_size",
    defaults={
        **sizes(201088, 2880, 2880, layers=36, heads=64, kv_heads=8, positions=131072),
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "head_dim": 64,
        "sliding_window": 128,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    kinds={"experts_per_token": SIZES, "swiglu_limit": POSITIVE, "swiglu_alpha": POSITIVE},
    harmless="initial_context_length",
    router="mlp.router.weight",
    routing="topk_softmax",
    transposed=True,
    interleaved=True,
    expert_biases=True,
    decoder=_decoder,
    transformers=stock("gpt_oss", "GptOss"),
)

FAMILIES = (GPT_OSS,)
