"""Keys of `config.json` that change nothing of what a decoder computes, whatever they say.

They are grouped by who writes them; those that one architecture has stand in its record. A key that is missing there
and here and that no builder reads is refused: it could matter.
"""

from collections.abc import Mapping
from typing import Any

_GROUPS: Mapping[str, str] = {
    "what every config of transformers has": """
        add_cross_attention architectures _attn_implementation attn_implementation _attn_implementation_autoset
        _attn_implementation_internal auto_map base_model_tp_plan chunk_size_feed_forward _commit_hash
        cross_attention_hidden_size decoder_start_token_id dtype _experts_implementation experts_implementation
        _experts_implementation_internal finetuning_task _flash_attn_2_enabled id2label is_decoder
        is_encoder_decoder keys_to_ignore_at_inference label2id model_type _name_or_path name_or_path num_labels
        _output_attentions output_attentions output_hidden_states prefix problem_type pruned_heads
        quantization_config return_dict task_specific_params tf_legacy_loss tie_encoder_decoder
        tie_last_hidden_states tokenizer_class torch_dtype torchscript transformers_version transformers_weights
        use_bfloat16 use_flash_attention_2 use_return_dict
    """,
    "how texts are generated, which transformers 4 kept here": """
        assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind
        bad_words_ids begin_suppress_tokens cache_config cache_implementation compile_config constraints
        continuous_batching_config disable_compile diversity_penalty do_sample dola_layers early_stopping
        encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
        exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_decoder_ids
        forced_eos_token_id guidance_scale is_assistant length_penalty low_memory max_cache_len max_length
        max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size
        num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences
        output_logits output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens
        remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate sequence_bias
        speculation_type stop_strings suppress_tokens target_lookbehind temperature token_healing top_h top_k
        top_p typical_p use_cache watermarking_config
    """,
    "tokens and tokenizers": """
        bos_token_id eod_id eod_token_id eos_token_id image_token_id max_seq_length max_sequence_length
        model_max_length pad_id pad_token_id padding_side sep_token_id tokenizer_model_max_length
        tokenizer_padding_side unk_token_id
    """,
    "training": """
        attention_dropout aux_loss_alpha embd_pdrop embedding_dropout ep_size gradient_checkpointing
        gradient_checkpointing_kwargs hidden_dropout hidden_dropout_prob initializer_range input_jitter_noise
        loss_type moe_dropout_prob moe_router_enable_expert_bias mtp_loss_scaling_factor neftune_noise_alpha
        output_dropout output_router_logits pretraining_tp resid_pdrop router_aux_loss_coef router_z_loss_coef
        seq_aux sft_max_length use_reentrant vocab_size_per_partition
    """,
    "multi-token prediction, which is copied and never run": """
        mtp_num_hidden_layers mtp_transformer_layers num_mtp_layers num_mtp_modules num_nextn_predict_layers use_mtp
    """,
    "which layers have experts, and how many: the tensors say it": """
        decoder_sparse_step first_k_dense_replace mlp_layer_types mlp_only_layers moe_layer_end_index
        moe_layer_freq moe_layer_interval moe_layer_start_index moe_num_experts n_routed_experts
        n_shared_experts num_dense_layers num_experts num_local_experts
    """,
    "which layers have a window, where `layer_types` says it": """
        global_attn_every_n_layers max_window_layers sliding_window_pattern
    """,
    "other things that nothing is computed with": "language_model_only max_position_embeddings",
    "programs: jaxmoe, Unsloth, transformers.js": "jaxmoe transformers.js_config unsloth_fixed unsloth_version",
}

HARMLESS = frozenset(name for names in _GROUPS.values() for name in names.split())
"""What does not change what the model computes, or what the tensors on disk say for certain."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n_group": (1,),
    "topk_group": (1,),
    "routed_scaling_factor": (1.0,),
}
"""What changes nothing with these values, and has them in configs of architectures without it."""
