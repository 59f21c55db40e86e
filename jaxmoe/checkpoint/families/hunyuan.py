"""Hunyuan-A13B and Hy3 of Tencent."""

from jaxmoe.checkpoint.families.family import Family
from jaxmoe.checkpoint.families.parts import (
    COUNTS,
    FIRST_DENSE,
    FLAG,
    MLP_LAYER_TYPES,
    NUMBER,
    Settings,
    Shapes,
    build,
    grouped_query,
    shared_experts,
    sigmoid,
    sizes,
    softmax,
    stock,
)
from jaxmoe.model.spec import DecoderSpec


def _hunyuan_v1_moe(s: Settings, shapes: Shapes) -> DecoderSpec:
    for name in ("qk_norm", "use_qk_norm", "use_mixed_mlp_moe", "norm_topk_prob"):
        s.expect(name, True)
    s.expect("routed_scaling_factor", False, 1.0)

    def shared(s: Settings, index: int) -> int:
        # The size of one is that of the routed experts, for which the config has two names.
        return s.of_layer("num_shared_expert", index, 1) * shapes[index].intermediate

    return build(
        s,
        shapes,
        router=softmax(top_k="moe_topk|num_experts_per_tok", normalize=True),
        attention=grouped_query(norm="head", norm_after_rotary=True),
        shared=shared,
    )


def _hy_v3(s: Settings, shapes: Shapes) -> DecoderSpec:
    return build(
        s,
        shapes,
        router=sigmoid(scale="router_scaling_factor"),
        attention=grouped_query(norm="head"),
        shared=shared_experts("num_shared_experts"),
        mlp_bias=s.take("mlp_bias"),
    )


HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    experts="num_experts",
    top_k="moe_topk",
    intermediate="intermediate_size",
    defaults={
        **sizes(290943, 4096, 11008, layers=32, heads=32, positions=2048),
        "rms_norm_eps": 1e-5,
        "num_experts": 1,
        "moe_topk": 1,
    },
    kinds={"num_shared_expert": COUNTS, "qk_norm": FLAG, "use_mixed_mlp_moe": FLAG},
    # Tokens, training, and what its code has for pictures and classes.
    harmless="""
        add_classification_head cla_share_factor class_num dense_list im_end_id im_newline_id im_start_id mask_init_id
        moe_drop_tokens num_media_embeds org_vocab_size pool_type skip_cls_token text_end_id text_start_id video_end_id
        video_start_id vit_input_resolution vit_mapping_type vit_norm_type vit_patch vit_path vit_token vit_type
    """,
    neutral={"norm_type": ("rms",), "use_rotary_pos_emb": (True,)},
    router="mlp.gate.wg.weight",
    routing="softmax_normalised",
    shared="mlp.shared_mlp",
    names={"attention.query_norm": "self_attn.query_layernorm", "attention.key_norm": "self_attn.key_layernorm"},
    decoder=_hunyuan_v1_moe,
    transformers=stock("hunyuan_v1_moe", "HunYuanMoEV1"),
)

HY_V3 = Family(
    model_type="hy_v3",
    moe_layers=(MLP_LAYER_TYPES, FIRST_DENSE),
    defaults={
        **sizes(120832, 4096, 13312, layers=80, heads=64, kv_heads=8, positions=131072),
        "rope_theta": 11158840.0,
        "rms_norm_eps": 1e-5,
        "head_dim": 128,
        "num_experts": 192,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 1536,
        "router_scaling_factor": 2.826,
    },
    kinds={"router_scaling_factor": NUMBER},
    harmless="enable_moe_fp32_combine",
    router="mlp.router.gate.weight",
    routing="sigmoid_bias",
    bias="mlp.expert_bias",
    shared="mlp.shared_mlp",
    shared_module="mlp.shared_experts",
    decoder=_hy_v3,
    transformers=stock("hy_v3", "HYV3"),
)

FAMILIES = (HUNYUAN_V1_MOE, HY_V3)
