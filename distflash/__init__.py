"""distflash: exact attention over many GPUs."""

from distflash import kernels, nn, transport
from distflash.api import ContextParallel, attention
from distflash.checkpointing import checkpoint_policy, keep_attention
from distflash.layouts import Contiguous, Layout, Striped, Zigzag
from distflash.masks import Causal, Chunked, Documents, Full, Mask, PrefixLM, Window
from distflash.schedules import Ring
from distflash.transport import RankFailure

__version__ = "0.1.0"

__all__ = [
    "Causal",
    "Chunked",
    "Contiguous",
    "ContextParallel",
    "Documents",
    "Full",
    "Layout",
    "Mask",
    "PrefixLM",
    "RankFailure",
    "Ring",
    "Striped",
    "Window",
    "Zigzag",
    "attention",
    "checkpoint_policy",
    "keep_attention",
    "kernels",
    "nn",
    "transport",
]
