"""torchtitan (0.3.0): its trainer with context parallelism by distflash.

    from distflash.integrations.torchtitan import context_parallel

    def llama3_8b_ring():                               # in a config_registry of your own
        return context_parallel(llama3_8b())            # then --parallelism.context_parallel_degree 8

Nothing is patched: torchtitan's `override` replaces the inner attention of the decoder's layers, and a subclass of its
trainer passes each layer the documents of the batch.
"""

from distflash.extras import needed

with needed("torchtitan", "torchtitan", "spmd_types", "tyro"):
    from distflash.integrations.torchtitan.attention import Batch, RingAttention
    from distflash.integrations.torchtitan.trainer import Trainer, Validator, context_parallel

__all__ = ["Batch", "RingAttention", "Trainer", "Validator", "context_parallel"]
