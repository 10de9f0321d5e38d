"""Context parallelism for models of Hugging Face Transformers.

    register(cp)                                        # attn_implementation="distflash" now means attention over cp
    model = AutoModelForCausalLM.from_config(config, attn_implementation="distflash")
    loss = model(**shard_batch(batch, cp)).loss         # every rank of cp is given the same whole batch
    loss.backward()                                     # gradients are averaged over the ranks, as DDP and FSDP do

Nothing is patched: an attention and a mask function are registered by name in Transformers' registry. The mask function
converts the mask that a model requests to a `Mask`, instead of a matrix. The length of the whole sequence and its
documents are passed with the batch as a `Shard`, a keyword of the model's forward that reaches every layer.

    cache = ShardedCache(cp)                            # keys and values, sharded over the ranks
    cache.prefill(model, ids)                           # every rank is given the same whole prompt
    tokens = model.generate(ids, past_key_values=cache) # the same on every rank

    Trainer(model, args, context_parallel=cp, train_dataset=dataset).train()   # also SFTTrainer; of accelerate: prepare
"""

from importlib import import_module
from typing import Any

from distflash.extras import needed

with needed("transformers", "transformers"):
    from distflash.integrations.transformers.batch import (
        NAME,
        OTHER_NAME,
        Shard,
        shard_batch,
        shard_labels,
        shard_position_ids,
    )
    from distflash.integrations.transformers.gathering import GatheredLayers, gather_layers
    from distflash.integrations.transformers.grouping import group_key_heads
    from distflash.integrations.transformers.loss import loss_function
    from distflash.integrations.transformers.mixers import MIXERS
    from distflash.integrations.transformers.one_rank import DecidedByOneRank
    from distflash.integrations.transformers.registry import register, unregister
    from distflash.integrations.transformers.router_loss import router_aux_loss
    from distflash.integrations.transformers.sharded_cache import ShardedCache
    from distflash.integrations.transformers.shifting import Shifted

__all__ = [
    "MIXERS",
    "NAME",
    "GatheredLayers",
    "gather_layers",
    "OTHER_NAME",
    "DecidedByOneRank",
    "Shard",
    "ShardedCache",
    "Shifted",
    "group_key_heads",
    "loss_function",
    "register",
    "router_aux_loss",
    "shard_batch",
    "shard_labels",
    "shard_position_ids",
    "unregister",
]

# Where the names are that need accelerate or TRL, which are imported only when they are used.
_IMPORTED_LATE = {
    "ContextParallelMixin": "trainer",
    "SFTTrainer": "sft",
    "Trainer": "trainer",
    "prepare": "accelerated",
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed("trainer", "accelerate", "trl"):
        return getattr(import_module(f"{__name__}.{_IMPORTED_LATE[name]}"), name)
