"""Megatron-Core (0.19.2): the core attention of its layers, over the ranks of its context group.

    cp = df.ContextParallel(parallel_state.get_context_parallel_group(), df.Zigzag())
    spec = get_gpt_layer_local_spec()                   # or another one
    spec.submodules.self_attention.submodules.core_attention = core_attention(cp)

Nothing is patched. Batches, positions and gradients are those of Megatron's context parallelism:
``get_batch_on_this_cp_rank`` shards each batch, packed documents (``thd``) in the layout `PerDocument`.
"""

from distflash.extras import needed

with needed("megatron", "megatron"):
    from distflash.integrations.megatron.attention import CoreAttention, core_attention
    from distflash.integrations.megatron.packed import PerDocument

__all__ = ["CoreAttention", "PerDocument", "core_attention"]
