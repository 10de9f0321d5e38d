"""Attention on one device by others. What makes a candidate raises where its library does not import."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import distflash as df
from benchmarks.contest import Candidate
from distflash.masks import And

CUDNN, FLASH, FLASH4, FLEX = "SDPA cuDNN", "SDPA flash", "flash-attn-4", "FlexAttention"


@cache
def sdpa(backend: SDPBackend) -> Candidate:
    """PyTorch's scaled_dot_product_attention by one of its kernels: full and causal."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        require(mask, df.Full, df.Causal)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, is_causal=isinstance(mask, df.Causal), enable_gqa=q.shape[1] != k.shape[1]
            )

    return Candidate(attend, heads_first=True)


def flex() -> Candidate:
    """FlexAttention, compiled: any mask, from its ends.

    Compiled anew for every contest: after eight shapes the compiler would give up, and run it uncompiled.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    @lru_cache(4)
    def blocks(mask: df.Mask, length: int, device: torch.device) -> Any:
        if isinstance(mask, df.Full):
            return None
        if isinstance(mask, df.Causal):
            return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
        lo, hi = mask.ends(torch.arange(length, device=device), length)
        return create_block_mask(
            lambda b, h, i, j: (j >= lo[i]) & (j < hi[i]), None, None, length, length, device=device
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        found = blocks(mask, q.shape[2], q.device)
        return compiled(q, k, v, block_mask=found, enable_gqa=q.shape[1] != k.shape[1])

    return Candidate(attend, heads_first=True)


@cache
def flash_attention_4() -> Candidate:
    """The package flash-attn-4: full, causal, windows, and causal documents of a batch of one."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    @lru_cache(4)
    def boundaries(mask: df.Documents, device: torch.device) -> tuple[Tensor, int]:
        ends = torch.tensor(mask.cu_seqlens, dtype=torch.int32)
        return ends.to(device), int(ends.diff().max())

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        if isinstance(mask, And) and isinstance(mask.first, df.Causal) and isinstance(mask.second, df.Documents):
            ends, longest = boundaries(mask.second, q.device)
            lengths = dict(cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest)
            assert q.shape[0] == 1, "packed documents are a batch of one"
            return _out(flash_attn_varlen_func(q[0], k[0], v[0], causal=True, **lengths))[None]
        if isinstance(mask, df.Window):
            return _out(flash_attn_func(q, k, v, window_size=(mask.left, mask.right)))
        require(mask, df.Full, df.Causal)
        return _out(flash_attn_func(q, k, v, causal=isinstance(mask, df.Causal)))

    return Candidate(attend)


def _out(results: Any) -> Tensor:
    """Some versions return the log-sum-exp as well."""
    return results[0] if isinstance(results, tuple) else results


def require(mask: df.Mask, *kinds: type[df.Mask]) -> None:
    if not isinstance(mask, kinds):
        raise ValueError(f"takes {' and '.join(kind.__name__ for kind in kinds)} masks only")


MAKERS: dict[str, Callable[[], Candidate]] = {
    FLASH: lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    CUDNN: lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    FLASH4: flash_attention_4,
    FLEX: flex,
}
