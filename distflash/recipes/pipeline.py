"""The decoder as layers of a DeepSpeed pipeline, with the same modules and weights."""

from torch import nn

import distflash as df
from distflash.integrations.deepspeed import DecoderBlock, TokenWise
from distflash.recipes.model import Decoder


def pipeline_layers(decoder: Decoder, cp: df.ContextParallel, seq_len: int) -> list[nn.Module]:
    """Embedding, blocks, and norm with head. Every rank builds the whole decoder and keeps its stage's layers."""
    blocks = [DecoderBlock(lambda block=block: block, cp=cp, seq_len=seq_len) for block in decoder.blocks]
    return [TokenWise(lambda: decoder.embedding), *blocks, TokenWise(nn.Sequential, decoder.norm, decoder.head)]
