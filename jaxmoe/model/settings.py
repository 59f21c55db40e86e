"""A checkpoint's config, read with account: what is neither used nor known to be harmless is an error."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.errors import JaxmoeError

_REQUIRED = object()

HARMLESS = frozenset(
    """
    _attn_implementation _name_or_path architectures attention_dropout auto_map bos_token_id
    chunk_size_feed_forward dtype embd_pdrop embedding_dropout eod_token_id eos_token_id ep_size
    experts_implementation hidden_dropout hidden_dropout_prob id2label initializer_range input_jitter_noise
    is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id max_position_embeddings max_window_layers
    model_type output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp
    problem_type quantization_config resid_pdrop return_dict router_aux_loss_coef router_z_loss_coef
    sep_token_id seq_aux aux_loss_alpha torch_dtype transformers_version unk_token_id use_cache
    vocab_size_per_partition jaxmoe num_nextn_predict_layers num_mtp_layers mtp_loss_scaling_factor
    decoder_sparse_step mlp_only_layers first_k_dense_replace moe_layer_freq mlp_layer_types
    moe_layer_start_index moe_layer_end_index moe_layer_interval num_dense_layers num_experts num_local_experts
    n_routed_experts moe_num_experts im_end_id im_newline_id im_start_id image_token_id text_start_id
    text_end_id video_start_id video_end_id eod_id sft_max_length initial_context_length
    moe_router_enable_expert_bias output_dropout moe_dropout_prob moe_capacity moe_drop_tokens mask_init_id
    org_vocab_size pad_id num_media_embeds add_classification_head class_num dense_list pool_type skip_cls_token
    vit_input_resolution vit_mapping_type vit_norm_type vit_patch vit_path vit_token vit_type mtp_transformer_layers
    num_mtp_modules use_mtp mlp_intermediate_size shared_moe_mode cla_share_factor
    enable_moe_fp32_combine sliding_window_pattern global_attn_every_n_layers n_shared_experts
    load_balance_coeff use_grouped_mm
    """.split()  # noqa: SIM905
)
"""What does not change what the model computes, or what the tensors on disk say for certain."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_rmsnorm": (True,),
    "norm_type": ("rms",),
    "use_rotary_pos_emb": (True,),
    "moe_gate": ("topk",),
    "moe_use_aux_free": (True,),
    "compression_ratio": (1.0,),
    "layernorm_full_attention_alpha": (1.0,),
    "layernorm_full_attention_beta": (1.0,),
    "layernorm_linear_attention_alpha": (1.0,),
    "layernorm_linear_attention_beta": (1.0,),
    "layernorm_mlp_alpha": (1.0,),
    "layernorm_mlp_beta": (1.0,),
}
"""What has these values in every published checkpoint, so that nothing else was ever needed."""


class Settings:
    """A decoder's config that remembers what was read.

    Args:
        config: the part of `config.json` that describes the decoder.

    Example:
        >>> settings = Settings({"hidden_size": 8, "new_trick": True})
        >>> settings.take("hidden_size")
        8
        >>> settings.finish()
        Traceback (most recent call last):
            ...
        jaxmoe.errors.JaxmoeError: config.json: jaxmoe does not know what new_trick (True) does to the model, ...
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.read: set[str] = set()

    def take(self, names: str, default: Any = _REQUIRED) -> Any:
        """Return the first value, other than null, of alternative names `a|b`, else the default.

        Raises:
            JaxmoeError: there is neither a value nor a default.
        """
        found = [self.config[name] for name in names.split("|") if self.config.get(name) is not None]
        self.read |= set(names.split("|"))
        if found:
            return found[0]
        if default is _REQUIRED:
            raise JaxmoeError(f"config.json says nothing of {names.replace('|', ' or ')}: fetch the checkpoint again")
        return default

    def expect(self, name: str, *values: Any) -> None:
        """Accept an attribute, absent or with one of the values that change nothing; raise for any other one."""
        value = self.take(name, None)
        if value is not None and value not in values:
            raise JaxmoeError(f"config.json: {name} = {value!r} is not something that jaxmoe computes")

    def finish(self) -> None:
        """Raise if there is an attribute that was not read and is not known to be harmless; all are listed."""
        left = {
            name: value
            for name, value in self.config.items()
            if name not in self.read | HARMLESS and value not in (None, False, {}, [], *NEUTRAL.get(name, ()))
        }
        if left:
            listed = ", ".join(f"{name} ({value!r})" for name, value in sorted(left.items()))
            raise JaxmoeError(
                f"config.json: jaxmoe does not know what {listed} does to the model, and computes nothing that it is"
                " not sure of; statistics can be gathered through PyTorch instead (`jaxmoe.torch.statistics`)"
            )
