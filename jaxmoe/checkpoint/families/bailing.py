"""Ling of inclusionAI: Ling 1 (`bailing_moe`); Ling 2 and its hybrid are read and not run."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    FIRST_DENSE,
    FLAG,
    MLP_LAYER_TYPES,
    SIZES,
    WORD,
    Settings,
    Shapes,
    build,
    grouped_query,
    shared_experts,
    sizes,
    softmax,
    stock,
)
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import DecoderSpec

_SPARSE = (MLP_LAYER_TYPES, FIRST_DENSE)


def _decoder(s: Settings, shapes: Shapes) -> DecoderSpec:
    if s.take("score_function", None) == "sigmoid":
        raise JaxmoeError(
            "config.json: this is Ling 2 (BailingMoeV2), which chooses experts by sigmoids with a bias, in groups:"
            " jaxmoe runs Ling 1 under this model_type; methods that need the weights alone work, and statistics can be"
            " gathered through PyTorch (`jaxmoe.torch.statistics`)"
        )
    s.expect("score_function", "softmax")
    s.expect("router_dtype", "fp32")
    own = "moe_shared_expert_intermediate_size" if s.take("moe_shared_expert_intermediate_size", None) else ""
    return build(
        s,
        shapes,
        router=softmax(normalize="norm_topk_prob"),
        attention=grouped_query(bias="use_qkv_bias", output_bias="use_bias"),
        shared=shared_experts("num_shared_experts", own or "moe_intermediate_size"),
        head_norm=s.take("norm_head"),
    )


BAILING_MOE = Family(
    model_type="bailing_moe",
    # Ling 2 is published under the name of Ling 1.
    actual_type=lambda config: "bailing_moe_v2" if config.get("score_function") == "sigmoid" else "bailing_moe",
    moe_layers=_SPARSE,
    defaults={
        **sizes(30592, 1024, None, layers=24, heads=16, positions=16384),
        "norm_topk_prob": True,
        "norm_head": False,
        "use_bias": False,
        "use_qkv_bias": False,
        "num_experts": 16,
        "num_shared_experts": 0,
        "num_experts_per_tok": 2,
    },
    kinds={
        "moe_shared_expert_intermediate_size": SIZES,
        "use_qkv_bias": FLAG,
        "norm_head": FLAG,
        "score_function": WORD,
        "router_dtype": WORD,
    },
    shared="mlp.shared_experts",
    names={
        "attention.query": "attention.query_key_value[query]",
        "attention.key": "attention.query_key_value[key]",
        "attention.value": "attention.query_key_value[value]",
        "attention.output": "attention.dense",
        "embedding": "model.word_embeddings",
    },
    decoder=_decoder,
)

BAILING_MOE_V2 = Family(
    model_type="bailing_moe_v2",
    moe_layers=_SPARSE,
    routing="deepseek_v3",
    bias="mlp.gate.expert_bias",
    shared="mlp.shared_experts",
)

BAILING_HYBRID = Family(
    model_type="bailing_hybrid",
    top_k="num_experts_per_token|num_experts_per_tok",
    moe_layers=_SPARSE,
    routing="deepseek_v3",
    bias="mlp.gate.expert_bias",
    shared="mlp.shared_experts",
    transformers=stock("bailing_hybrid", "BailingHybrid", since="5.20"),
    # Tried with transformers 5.24: its conversion finds no tensors to join.
    not_packed="transformers renames its experts before it unpacks them, and then finds none",
)

FAMILIES = (BAILING_MOE, BAILING_MOE_V2, BAILING_HYBRID)
