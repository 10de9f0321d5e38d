"""The public names. `import distflash` loads this module, and torch, when the first one is used."""

from distflash import kernels, nn, transport
from distflash.api import attention
from distflash.balanced import Balanced
from distflash.cache import Cache
from distflash.checkpointing import checkpoint_policy, keep_attention
from distflash.context import ContextParallel
from distflash.decode_step import decode
from distflash.differences import Report
from distflash.dropout import dropout_mask
from distflash.layouts import Contiguous, Layout, Striped, WholeChunks, Zigzag
from distflash.mask_algebra import Mask
from distflash.masks import Causal, Chunked, Documents, Full, PrefixLM, Window
from distflash.patterns import BlockCausal, FirstTokens, ImageBlocks, Tree
from distflash.rows import Rows
from distflash.schedules import AllGather, DoubleRing, PassQuery, Reproducible, Ring, Ulysses
from distflash.transport import RankFailure
from distflash.verification import verify

__all__ = [
    "Balanced",
    "AllGather",
    "BlockCausal",
    "Cache",
    "Causal",
    "Chunked",
    "Contiguous",
    "ContextParallel",
    "Documents",
    "DoubleRing",
    "FirstTokens",
    "Full",
    "ImageBlocks",
    "Layout",
    "Mask",
    "PassQuery",
    "PrefixLM",
    "RankFailure",
    "Report",
    "Reproducible",
    "Ring",
    "Rows",
    "Striped",
    "Tree",
    "Ulysses",
    "WholeChunks",
    "Window",
    "Zigzag",
    "attention",
    "checkpoint_policy",
    "decode",
    "dropout_mask",
    "keep_attention",
    "kernels",
    "nn",
    "transport",
    "verify",
]
