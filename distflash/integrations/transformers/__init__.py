"""Models of Hugging Face Transformers over a sequence that a group of ranks holds together.

    register(cp)                                        # attn_implementation="distflash" now means attention over cp
    model = AutoModelForCausalLM.from_config(config, attn_implementation="distflash")
    loss = model(**shard_batch(batch, cp)).loss         # every rank of cp is given the same whole batch
    loss.backward()                                     # gradients are averaged over the ranks, as DDP and FSDP do

Nothing of the library is patched: it is given one attention and one mask function by a name, through its own registry.
A layer's mask is the one that the model asks that registry for, as with the library's ``eager`` attention, but as a
`Mask` instead of a matrix, read from the functions of which the library composes it. What a mask cannot tell, where
documents end and how long the whole sequence is, travels with the batch as a `Shard`, a keyword of the model's forward
that reaches every layer.
"""

from distflash.integrations.transformers.batch import (
    NAME,
    OTHER_NAME,
    Shard,
    shard_batch,
    shard_labels,
    shard_position_ids,
)
from distflash.integrations.transformers.loss import loss_function
from distflash.integrations.transformers.registry import register, unregister

__all__ = [
    "NAME",
    "OTHER_NAME",
    "Shard",
    "loss_function",
    "register",
    "shard_batch",
    "shard_labels",
    "shard_position_ids",
    "unregister",
]
