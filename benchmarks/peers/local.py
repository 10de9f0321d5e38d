"""Attention of other libraries on one device. Makers raise if the library does not import."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import distflash as df
from benchmarks.comparison import Candidate
from distflash.mask_algebra import And

CUDNN, FLASH, FLASH4, FLEX = "SDPA cuDNN", "SDPA flash", "flash-attn-4", "FlexAttention"


@cache
def sdpa(backend: SDPBackend, dropout_p: float = 0.0) -> Candidate:
    """PyTorch's scaled_dot_product_attention with one of its kernels: full and causal."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        require(mask, df.Full, df.Causal)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q,
                k,
                v,
                dropout_p=dropout_p,
                is_causal=isinstance(mask, df.Causal),
                enable_gqa=q.shape[1] != k.shape[1],
            )

    return Candidate(attend, heads_first=True)


def flex() -> Candidate:
    """FlexAttention, compiled: any mask.

    Compiled anew for every candidate made, and those made before lose what was compiled: after eight shapes or kinds of
    mask the compiler would give up.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    @lru_cache(16)  # more than a comparison has: masks are not made on the clock
    def blocks(mask: df.Mask, length: int, device: torch.device) -> Any:
        if isinstance(mask, df.Full):
            return None
        return create_block_mask(flex_mask(mask, length, device), None, None, length, length, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        found = blocks(mask, q.shape[2], q.device)
        return compiled(q, k, v, block_mask=found, enable_gqa=q.shape[1] != k.shape[1])

    return Candidate(attend, heads_first=True)


def flex_mask(mask: df.Mask, length: int, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention's ``mask_mod`` of a mask: an interval of keys for each query, or several."""
    if isinstance(mask, df.Causal):
        return lambda b, h, i, j: i >= j
    parts = mask.parts(torch.arange(length, device=device), length)

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        (lo, hi), *more = parts
        seen = (j >= lo[i]) & (j < hi[i])
        for lo, hi in more:
            seen = seen | ((j >= lo[i]) & (j < hi[i]))
        return seen

    return allowed


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
