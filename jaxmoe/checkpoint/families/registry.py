"""The architectures that are known, and the one that a config is of."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.checkpoint.families.family import Family, decoder_config

_SPARSE = ("mlp_layer_types", "first_k_dense_replace")
_DEEPSEEK_BIAS = "mlp.gate.e_score_correction_bias"
_LING_2 = "bailing_moe_v2"
_W = "block_sparse_moe.gate.weight"

_RECORDS = (
    Family(
        model_types=("mixtral", "minimax"),
        experts="num_local_experts",
        intermediate="intermediate_size",
        router=_W,
        routing="softmax_normalised",
    ),
    Family(
        model_types=("minimax_m2",),
        experts="num_local_experts",
        intermediate="intermediate_size",
        router=_W,
        routing="sigmoid_bias",
        bias="block_sparse_moe.e_score_correction_bias",
    ),
    Family(
        model_types=("phimoe",),
        experts="num_local_experts",
        intermediate="intermediate_size",
        router=_W,
        routing="sparse_mixer",
    ),
    Family(model_types=("qwen2_moe", "qwen3_next"), shared="mlp.shared_expert", moe_layers=("decoder_sparse_step",)),
    Family(model_types=("qwen3_moe",), moe_layers=("decoder_sparse_step",)),
    Family(model_types=("qwen3_5_moe_text", "qwen3_5_moe"), shared="mlp.shared_expert", routing="softmax_normalised"),
    Family(model_types=("qwen3_vl_moe_text", "qwen3_vl_moe"), transposed=None, moe_layers=("decoder_sparse_step",)),
    Family(model_types=("olmoe", "flex_olmo"), intermediate="intermediate_size"),
    Family(
        model_types=("deepseek_v2",),
        experts="n_routed_experts",
        routing="deepseek_v2",
        shared="mlp.shared_experts",
        moe_layers=("first_k_dense_replace",),
    ),
    Family(
        model_types=(
            "deepseek_v3",
            "kimi_k2",
            "kimi_k25",
            "deepseek_v32",
            "glm_moe_dsa",
            "glm4_moe",
            "glm4_moe_lite",
            "dots1",
        ),
        experts="n_routed_experts",
        routing="deepseek_v3",
        bias=_DEEPSEEK_BIAS,
        shared="mlp.shared_experts",
        moe_layers=_SPARSE,
    ),
    Family(
        model_types=("solar_open",),
        experts="n_routed_experts",
        routing="deepseek_v3",
        bias=_DEEPSEEK_BIAS,
        shared="mlp.shared_experts",
    ),
    Family(
        model_types=("mimo_v2_flash",),
        experts="n_routed_experts",
        routing="deepseek_v3",
        bias=_DEEPSEEK_BIAS,
        moe_layers=("mlp_layer_types", "moe_layer_freq"),
    ),
    Family(
        model_types=("exaone_moe",),
        routing="deepseek_v3",
        bias="mlp.e_score_correction_bias",
        shared="mlp.shared_experts",
        moe_layers=_SPARSE,
    ),
    Family(model_types=("bailing_moe",), shared="mlp.shared_experts", moe_layers=_SPARSE),
    Family(
        model_types=(_LING_2,),
        routing="deepseek_v3",
        bias="mlp.gate.expert_bias",
        shared="mlp.shared_experts",
        moe_layers=_SPARSE,
    ),
    Family(
        model_types=("deepseek",),
        experts="n_routed_experts",
        shared="mlp.shared_experts",
        moe_layers=("first_k_dense_replace",),
    ),
    Family(
        model_types=("bailing_hybrid",),
        top_k="num_experts_per_token|num_experts_per_tok",
        routing="deepseek_v3",
        bias="mlp.gate.expert_bias",
        shared="mlp.shared_experts",
        moe_layers=_SPARSE,
    ),
    Family(
        model_types=("kimi_linear",),
        top_k="num_experts_per_token|num_experts_per_tok",
        router=_W,
        routing="deepseek_v3",
        bias="block_sparse_moe.gate.e_score_correction_bias",
        shared="block_sparse_moe.shared_experts",
        moe_layers=_SPARSE,
    ),
    Family(
        model_types=("nemotron_h",),
        experts="n_routed_experts",
        # With a latent size, the experts work between two projections that all of them share.
        hidden="moe_latent_size|hidden_size",
        module="mixer.experts",
        renamed=("backbone.", "model."),
        router="mixer.gate.weight",
        routing="deepseek_v3",
        bias="mixer.gate.e_score_correction_bias",
        shared="mixer.shared_experts",
        gated=False,
        moe_layers=("layers_block_type", "hybrid_override_pattern"),
    ),
    Family(
        model_types=("hy_v3",),
        router="mlp.router.gate.weight",
        routing="sigmoid_bias",
        bias="mlp.expert_bias",
        shared="mlp.shared_mlp",
        shared_module="mlp.shared_experts",
        moe_layers=_SPARSE,
    ),
    Family(
        model_types=("afmoe",),
        router="mlp.router.gate.weight",
        routing="sigmoid_bias",
        bias="mlp.expert_bias",
        shared="mlp.shared_experts",
        moe_layers=("num_dense_layers",),
    ),
    Family(
        model_types=("lfm2_moe",),
        module="feed_forward.experts",
        router="feed_forward.gate.weight",
        routing="sigmoid_lfm",
        bias="feed_forward.expert_bias",
        moe_layers=("num_dense_layers",),
    ),
    Family(
        model_types=("ernie4_5_moe",),
        experts="moe_num_experts",
        top_k="moe_k",
        routing="softmax_bias",
        bias="mlp.moe_statics.e_score_correction_bias",
        shared="mlp.shared_experts",
        moe_layers=("moe_layer_interval",),
    ),
    Family(
        model_types=("hunyuan_v1_moe",),
        experts="num_experts",
        top_k="moe_topk",
        intermediate="intermediate_size",
        router="mlp.gate.wg.weight",
        routing="softmax_normalised",
        shared="mlp.shared_mlp",
    ),
    Family(
        model_types=("gpt_oss",),
        experts="num_local_experts",
        intermediate="intermediate_size",
        router="mlp.router.weight",
        routing="topk_softmax",
        transposed=True,
        interleaved=True,
        expert_biases=True,
    ),
    Family(
        model_types=("llama4_text", "llama4"),
        experts="num_local_experts",
        intermediate="intermediate_size",
        module="feed_forward.experts",
        router="feed_forward.router.weight",
        routing="llama4",
        shared="feed_forward.shared_expert",
        transposed=True,
        moe_layers=("moe_layers", "interleave_moe_layer_step"),
    ),
    Family(
        model_types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        experts="num_local_experts",
        intermediate="intermediate_size",
        module="block_sparse_moe.experts",
        router="block_sparse_moe.router.layer.weight",
        routing="topk_softmax",
        shared="shared_mlp",
    ),
    Family(
        model_types=("jetmoe",),
        experts="num_local_experts",
        intermediate="intermediate_size",
        module="mlp",
        router="mlp.router.layer.weight",
        routing="topk_softmax",
        # Its attention is a mixture too, which no method here touches.
        known=r"\.self_attention\.experts\.",
    ),
    Family(
        model_types=("jamba",),
        experts="num_experts",
        intermediate="intermediate_size",
        module="feed_forward.experts",
        router="feed_forward.router.weight",
        moe_layers=("expert_layer_period",),
    ),
    Family(
        model_types=("cohere2_moe",),
        # Its config has one size for dense and for expert layers.
        intermediate="moe_intermediate_size|intermediate_size",
        routing="topk_softmax",
        shared="mlp.shared_experts",
        moe_layers=("mlp_layer_types", "first_k_dense_replace"),
    ),
    Family(
        model_types=("gemma4_text", "gemma4"),
        experts="num_experts",
        top_k="top_k_experts",
        module="experts",
        router="router.proj.weight",
        routing="gemma4",
        shared="mlp",
        known=r"\.per_expert_scale$",
    ),
    Family(
        model_types=("dbrx",),
        experts="ffn_config.moe_num_experts",
        top_k="ffn_config.moe_top_k",
        intermediate="ffn_config.ffn_hidden_size",
        hidden="d_model",
        module="ffn.experts.mlp",
        router="ffn.router.layer.weight",
        routing="dbrx",
    ),
    Family(
        model_types=("step3p7", "step3p5"),
        experts="n_routed_experts|moe_num_experts",
        module="moe.experts",
        router="moe.gate.weight",
        routing="sigmoid_bias",
        bias="moe.router_bias",
        shared="share_expert",
        moe_layers=("mlp_layer_types",),
        known=r"\.share_expert\.",
    ),
)

FAMILIES: dict[str, Family] = {model_type: record for record in _RECORDS for model_type in record.model_types}
"""The known architectures by `model_type`."""


def find_family(config: Mapping[str, Any]) -> Family | None:
    """Return the record of a checkpoint's architecture, or None if there is none."""
    decoder = decoder_config(config)
    if decoder.get("model_type") == "bailing_moe" and decoder.get("score_function") == "sigmoid":
        # Ling 2 is published under the name of Ling 1.
        return FAMILIES[_LING_2]
    return FAMILIES.get(str(config.get("model_type"))) or FAMILIES.get(str(decoder.get("model_type")))
