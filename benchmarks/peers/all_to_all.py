"""All-to-all over heads (DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509) around cuDNN's kernels.

Before attention each rank gives up the tokens of all but its share of the heads for all tokens of that share; after it,
the reverse. Tokens are in contiguous shards, and as many on every rank.

[Note: shapes] W ranks, T local tokens, S = W * T, h heads of the tensor at hand, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import distflash as df
from benchmarks.comparison import Candidate
from benchmarks.peers.local import require

NAME = "all-to-all on cuDNN"


class _Exchange(torch.autograd.Function):
    """Part n of ``[W, ...]`` to rank n, whose parts come back in the order of the ranks. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Exchange.apply(grad.contiguous())


def to_heads(x: Tensor, ranks: int) -> Tensor:
    """``[1, T, h, D]`` of all heads to ``[1, h / W, S, D]`` of this rank's."""
    _, T, h, D = x.shape
    parts = x.view(T, ranks, h // ranks, D).transpose(0, 1).contiguous()  # [W, T, h / W, D]
    return _Exchange.apply(parts).view(ranks * T, h // ranks, D).transpose(0, 1)[None]


def to_tokens(x: Tensor, ranks: int) -> Tensor:
    """``[1, h / W, S, D]`` of this rank's heads to ``[1, T, h, D]`` of its tokens."""
    _, h, S, D = x.shape
    parts = x[0].transpose(0, 1).reshape(ranks, S // ranks, h, D).contiguous()  # [W, T, h / W, D]
    return _Exchange.apply(parts).transpose(0, 1).reshape(1, S // ranks, ranks * h, D)


def all_to_all() -> Candidate:
    """For a batch of one, full and causal masks, and heads that divide by the number of ranks.

    Raises:
        ValueError: there are no ranks.
    """
    if not dist.is_initialized():
        raise ValueError("all-to-all: expected the ranks of a process group, got one process")
    ranks = dist.get_world_size()

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        require(mask, df.Full, df.Causal)
        q, k, v = (to_heads(x, ranks) for x in (q, k, v))
        backends = [SDPBackend.CUDNN_ATTENTION] if q.is_cuda else [SDPBackend.MATH]
        with sdpa_kernel(backends):
            out = scaled_dot_product_attention(q, k, v, is_causal=isinstance(mask, df.Causal), enable_gqa=True)
        return to_tokens(out, ranks)

    return Candidate(attend)
