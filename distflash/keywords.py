"""Keywords of other attention functions (scaled_dot_product_attention, flash-attn, FlexAttention), and ours for them.

An unknown keyword raises an error that says what to write instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

KNOWN = (
    *("mask", "cp", "seq_len", "q_start", "q_len", "kv_layout", "cache"),
    *("scale", "softcap", "alibi_slopes", "sinks", "dropout_p", "dropout_seed", "return_lse", "return_max_logits"),
)

_MASKS = (
    "df.Causal(), df.Window(left, right), df.Documents(cu_seqlens), df.PrefixLM(length), df.Chunked(size) and others "
    "(docs/masks.md)"
)
_INSTEAD = {
    ("causal", "is_causal"): "write mask=df.Causal()",
    ("attn_mask", "attention_mask", "attn_bias", "bias", "block_mask", "mask_mod"): (
        f"masks are objects, which every rank can evaluate at its own positions: write mask= and one of {_MASKS}, "
        "combined with & and |; a rule of your own is a subclass of df.Mask with `ends`"
    ),
    ("window_size", "sliding_window", "window", "local_size"): (
        "write mask=df.Window(left, right); a causal window of w keys, the query's own included, is df.Window(w - 1); "
        "a side without a limit (elsewhere -1) is sys.maxsize"
    ),
    ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_kv", "cu_seq_lens_q", "cu_seq_lens_k"): (
        "write mask=df.Documents(cu_seqlens), or df.Causal() & df.Documents(cu_seqlens), with those of the keys; "
        "queries that are some of their tokens are said by q_start= and q_len="
    ),
    ("max_seqlen", "max_seqlen_q", "max_seqlen_k", "max_length_q", "max_length_k"): (
        "leave it out: df.Documents(cu_seqlens) knows the lengths"
    ),
    ("q_offset", "query_offset", "start_pos"): (
        "write q_start=, the position of the first query among the keys, and q_len=, how many queries all ranks hold; "
        "with cache= write neither, the queries come behind the tokens that it has had"
    ),
    ("cache_seqlens", "cache_position", "k_cache", "v_cache", "past_key_values", "past_key_value", "kv_cache"): (
        "write cache=, a df.Cache, which knows its length (docs/inference.md); or, where k and v hold all keys, "
        "q_start=, the position of the first query among them, and q_len="
    ),
    ("q_positions", "positions"): (
        "leave it out: cp.layout and the cache's length tell positions; rotate q and k by them before the call"
    ),
    ("segment_ids", "document_ids", "position_ids"): "write mask=df.Documents(cu_seqlens)",
    ("softmax_scale", "sm_scale", "scaling"): "write scale=",
    ("logits_soft_cap", "logit_cap", "soft_cap", "logits_softcap"): "write softcap=",
    (
        "dropout",
        "attn_dropout",
        "attention_dropout",
        "p_dropout",
    ): "write dropout_p=, and dropout_seed=, the same on all ranks",
    ("score_mod",): "scores change by scale=, softcap= and alibi_slopes= only",
    ("enable_gqa", "num_kv_groups"): "leave it out: k and v may have fewer heads, which have to divide q's",
    ("s_aux", "sink", "learnable_sink"): "write sinks=, one number per query head",
    ("return_attn_probs", "return_softmax_lse", "return_softmax"): "write return_lse=True",
    ("return_max_logit", "max_logit", "max_logits"): "write return_max_logits=True",
    ("group", "process_group", "mesh", "device_mesh"): "write cp=df.ContextParallel(group), made once",
    ("layout", "schedule", "kernel", "deterministic", "backend"): (
        "it belongs to the group: df.ContextParallel(group, layout=, schedule=, kernel=); kernels that give the same "
        "bits in every run are df.kernels.Triton() and df.kernels.Hopper(deterministic=True)"
    ),
    ("tensor_layout", "qkv_format", "heads_first"): "q, k and v are [batch, seq_local, heads, head_dim]",
}


def problem(unknown: Iterable[str]) -> str | None:
    """The error for the first of these unknown keywords, with its equivalent; None if there are none."""
    for name in unknown:
        for names, words in _INSTEAD.items():
            if name in names:
                return f"{name}: attention has no such keyword; {words}"
        close = get_close_matches(name, KNOWN, n=1)
        guess = f"did you mean {close[0]}=? " if close else ""
        return f"{name}: attention has no such keyword; {guess}it takes {', '.join(KNOWN)}"
    return None
