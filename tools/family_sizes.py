"""Sizes that make the configuration of any family tiny, by the names that configurations have for them."""

from __future__ import annotations

from typing import Any

# Every expert takes every token: a choice of experts would jump at a rounding.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size", "hidden_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 128),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Multi-head latent attention: 4 heads of 8 + 8 columns, from 16.
_LATENT = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "num_key_value_heads": 4,
}
_DEEPSEEK = {**_LATENT, "head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_INDEXER = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
_DEEPSEEK_INDEXED = {**_DEEPSEEK, **_INDEXER}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_ALTERNATING = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
_DELTA = {
    **_ALTERNATING,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
}
_LAYER_TYPES = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SHORT_WINDOWS = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4}

# Families that take no attention with "flash" in its name.
WITHOUT_FLASH = ("hrm_text", "llama4_text")

# By model type, or by class where a family's classes want different ones.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "glm4_moe_lite"), _DEEPSEEK),
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "hy_v4"), _DEEPSEEK_INDEXED),
    **dict.fromkeys(("youtu", "longcat_flash"), _LATENT),
    "kimi_linear": {**_LATENT, **_ALTERNATING, "linear_head_dim": 8, "linear_num_heads": 4},
    "minicpm3": {**_LATENT, "head_dim": 16},
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {**_LATENT, "n_shared_experts": 1},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_ngroups": 1, "n_mamba_heads": 2},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _DELTA),
    "qwen4_exp_text": {
        **_DELTA,
        **dict.fromkeys(("indexer_n_heads", "indexer_compress_ratio"), 2),
        "indexer_kv_heads": 1,
        **dict.fromkeys(("indexer_head_dim", "indexer_budget"), 8),
        "ngram_vocab_size_base": 64,
    },
    **dict.fromkeys(("inkling_text", "inkling2_text"), _SHORT_WINDOWS),
    "lfm2_moe": {**_CONVOLUTIONS, "num_dense_layers": 1},
    **dict.fromkeys(("lfm2", "lfm3"), _CONVOLUTIONS),
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "minimax": _ALTERNATING,
    "bailing_hybrid": {**_DEEPSEEK, **_ALTERNATING, "linear_head_dim": 8, "linear_num_heads": 4},
    "rwkv": {"attention_hidden_size": 32, "use_cache": False},
    "xlstm": {
        **{"num_heads": 4, "num_blocks": 2, "chunk_size": 16, "ffn_round_up_to_multiple_of": 8},
        **{"autocast_kernel_dtype": "float32", "use_cache": False},
    },
    "cohere_compass_text": {
        "layer_types": _LAYER_TYPES,
        "rope_parameters": dict.fromkeys(_LAYER_TYPES, _ROPE),
        "sliding_window": 6,
    },
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "qwen2_moe": {"decoder_sparse_step": 1},
    # Chunks and scales that 23 tokens meet.
    "llama4_text": {"attention_chunk_size": 6, "no_rope_layer_interval": 2, "floor_scale": 4},
    "neomme": {"head_dim": 16},
    "esmc": {"num_key_value_heads": 4},
    "luke": {"entity_vocab_size": 64, "entity_emb_size": 8},
    "xlm": {"emb_dim": 32},
    "flaubert": {"emb_dim": 32},
    "funnel": {"block_sizes": (1, 1), "d_head": 8, "d_inner": 48},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": 64},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"]},
    "ReformerForMaskedLM": {"axial_pos_embds": False, "attn_layers": ["local"]},
    # As they come they have windows of thousands of tokens.
    **{
        name: {"sliding_window": 6} for name in ("mistral", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "starcoder2")
    },
}
