"""Context parallelism in DeepSpeed: ZeRO 0 to 3, and pipelines.

    deepspeed.init_distributed()
    topology = Topology(context=4)                       # or pipe=2, context=4; data is what is left of the ranks
    model = MyDecoder(..., cp=topology.cp)
    engine, *_ = initialize(topology, model=model, config="zero3.json", optimizer=...)
    tokens, labels = ShardBatch(topology.cp, seq_len)(batch)     # every rank of a ring is given the same whole batch
    logits = engine(tokens)
    engine.backward(topology.mean(F.cross_entropy(..., reduction="sum"), labels.numel()))
    engine.step()

Nothing is patched: DeepSpeed treats ranks that share a sequence as data-parallel ranks. It shards over them and
averages their gradients; the loss is scaled so that this average is the gradient.
"""

from distflash.extras import needed

with needed("deepspeed", "deepspeed"):
    from distflash.integrations.deepspeed.attention import (
        DistributedAttention,
        Order,
        redirect_attention,
        replace_attention,
    )
    from distflash.integrations.deepspeed.batch import ShardBatch, shift_labels
    from distflash.integrations.deepspeed.engine import checkpoint_layers, clip_gradients, initialize, pipeline_module
    from distflash.integrations.deepspeed.layers import CausalLoss, DecoderBlock, Embedding, TokenWise
    from distflash.integrations.deepspeed.topology import Topology

__all__ = [
    "CausalLoss",
    "DecoderBlock",
    "DistributedAttention",
    "Embedding",
    "Order",
    "ShardBatch",
    "TokenWise",
    "Topology",
    "checkpoint_layers",
    "clip_gradients",
    "initialize",
    "pipeline_module",
    "redirect_attention",
    "replace_attention",
    "shift_labels",
]
