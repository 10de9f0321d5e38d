"""What `import distflash` gives. A module of its own, so that the command line can answer without loading torch."""

from distflash import kernels, nn, transport
from distflash.api import ContextParallel, attention
from distflash.checkpointing import checkpoint_policy, keep_attention
from distflash.differences import Report
from distflash.layouts import Contiguous, Layout, Striped, Zigzag
from distflash.masks import Causal, Chunked, Documents, Full, Mask, PrefixLM, Window
from distflash.patterns import BlockCausal, FirstTokens, ImageBlocks, Tree
from distflash.schedules import Ring
from distflash.transport import RankFailure
from distflash.verification import verify

__all__ = [
    "BlockCausal",
    "Causal",
    "Chunked",
    "Contiguous",
    "ContextParallel",
    "Documents",
    "FirstTokens",
    "Full",
    "ImageBlocks",
    "Layout",
    "Mask",
    "PrefixLM",
    "RankFailure",
    "Report",
    "Ring",
    "Striped",
    "Tree",
    "Window",
    "Zigzag",
    "attention",
    "checkpoint_policy",
    "keep_attention",
    "kernels",
    "nn",
    "transport",
    "verify",
]
