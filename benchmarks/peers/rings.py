"""Causal attention of other libraries over several devices, on zigzag shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import distflash as df
from benchmarks.comparison import Candidate
from benchmarks.peers import zigzag
from benchmarks.peers.local import require
from distflash.transport import Transport

ZIGZAG4, PACKAGE = "zigzag on flash-attn-4", "ring-flash-attn"
TORCH = {"torch, all-gather": "allgather", "torch, all-to-all": "alltoall"}


def makers(transport: Transport) -> dict[str, Callable[[], Candidate]]:
    """All except PyTorch's, which need `torch_context_parallel`. Each raises if its library does not import."""
    return {ZIGZAG4: lambda: zigzag.ring(transport, zigzag.FlashAttention4()), PACKAGE: ring_flash_attn}


def ring_flash_attn() -> Candidate:
    """The package ring-flash-attn, which needs the kernels of FlashAttention 2."""
    from ring_flash_attn import zigzag_ring_flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        require(mask, df.Causal)
        return zigzag_ring_flash_attn_func(q, k, v, causal=True)

    return Candidate(attend)


def torch_ring(method: str) -> Candidate:
    """PyTorch's own context parallelism on cuDNN's kernels; runs within `torch_context_parallel` only.

    Args:
        method: how keys and values get to the other ranks, "allgather" or "alltoall".
    """
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: df.Mask) -> Tensor:
        require(mask, df.Causal)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            # By name from the module: context_parallel replaces it there.
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )

    # The method is one of the process, and both passes read it.
    return Candidate(attend, heads_first=True, before=lambda: set_rotate_method(method))


def repeated(candidate: Candidate) -> Candidate:
    """The same on keys and values repeated for each query head, for want of grouped heads."""
    return replace(candidate, repeat_heads=True)


@contextmanager
def torch_context_parallel(seq_len: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's scaled_dot_product_attention is its context-parallel one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # It insists on a buffer to shard; ours are sharded already.
    nothing = torch.zeros(1, seq_len, dtype=torch.int8, device=device)
    with context_parallel(mesh, buffers=[nothing], buffer_seq_dims=[1], no_restore_buffers={nothing}):
        yield
