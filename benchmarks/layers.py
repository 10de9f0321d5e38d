"""Models to time attention in: a loop of attention layers, and decoder blocks of an 8B model.

[Note: shapes] B batch, T local tokens, H query heads, G key heads, D head dim, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distflash as df
from benchmarks.common import Shape
from benchmarks.comparison import BOTH, FORWARD, Candidate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Loop(Protocol):
    """A number of layers, one after the other."""

    def forward(self) -> Tensor: ...

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward; returns the gradients."""
        ...


def calls_of(loop: Loop) -> dict[str, Callable[[], object]]:
    return {FORWARD: torch.no_grad()(loop.forward), BOTH: loop.step}


class AttentionLayers:
    """Attention alone: a layer's output is the queries of the next, and every layer has keys and values of its own.

    Args:
        candidate: whose attention.
        inputs: ``q, k, v, dout``, with values as wide as keys.
    """

    def __init__(self, candidate: Candidate, inputs: tuple[Tensor, ...], mask: df.Mask, layers: int) -> None:
        self.candidate, self.mask = candidate, mask
        self.q, k, v, self.dout = candidate.native(inputs)
        # Leaves on one memory: gradients are those of layers with weights of their own, nothing adds them up.
        self.keys = [tuple(x.detach().requires_grad_() for x in (k, v)) for _ in range(layers)]
        self.leaves = (self.q, *(x for pair in self.keys for x in pair))

    def forward(self) -> Tensor:
        x = self.q
        for k, v in self.keys:
            self.candidate.before()
            x = self.candidate.attend(x, k, v, self.mask)
        return x

    def step(self) -> tuple[Tensor, ...]:
        out = self.forward()
        self.candidate.before()
        return torch.autograd.grad(out, self.leaves, self.dout)


@dataclass(frozen=True)
class Sizes:
    """Of a decoder block; the defaults are those of an 8B model."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 14336

    def attention(self, seq_len: int) -> Shape:
        return Shape(1, seq_len, self.heads, self.kv_heads, self.head_dim, self.head_dim)


class DecoderBlock(nn.Module):
    """Pre-norm attention with rotary positions and a SwiGLU MLP, as in Llama (https://arxiv.org/abs/2407.21783).

    Args:
        attend: ``(q [B, T, H, D], k [B, T, G, D], v) -> out [B, T, H, D]``.
    """

    def __init__(self, sizes: Sizes, attend: Attend, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.sizes, self.attend = sizes, attend
        wide = sizes.head_dim * (sizes.heads + 2 * sizes.kv_heads)

        def linear(size_in: int, size_out: int) -> nn.Linear:
            return nn.Linear(size_in, size_out, bias=False, dtype=dtype, device=device)

        self.qkv = linear(sizes.hidden, wide)
        self.out = linear(sizes.heads * sizes.head_dim, sizes.hidden)
        self.gate_up, self.down = linear(sizes.hidden, 2 * sizes.mlp), linear(sizes.mlp, sizes.hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(sizes.hidden, dtype=dtype, device=device) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x [B, T, C]``; cos, sin ``[T, 1, D]`` of this rank's positions."""
        H, G, D = self.sizes.heads, self.sizes.kv_heads, self.sizes.head_dim
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (H + 2 * G, D)).split((H, G, G), 2)
        out = self.attend(rotated(q, cos, sin), rotated(k, cos, sin), v.contiguous())
        x = x + self.out(out.flatten(2))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, T, h, D]`` with rotary positions."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotations(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``cos, sin [T, 1, D]`` of positions ``[T]``."""
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * 500000.0**-steps
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Blocks:
    """Decoder blocks with weights of their own.

    Args:
        modules: of them; compiled or not.
        positions: of this rank's tokens, ``[T]``.
    """

    def __init__(self, modules: list[nn.Module], sizes: Sizes, positions: Tensor, dtype: torch.dtype) -> None:
        self.modules = modules
        self.x = torch.randn(1, len(positions), sizes.hidden, device=positions.device, dtype=dtype, requires_grad=True)
        self.dout = torch.randn_like(self.x, requires_grad=False)
        self.rotations = rotations(positions, sizes.head_dim, dtype)
        self.leaves = (self.x, *(weight for module in modules for weight in module.parameters()))

    def forward(self) -> Tensor:
        x = self.x
        for module in self.modules:
            x = module(x, *self.rotations)
        return x

    def step(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.dout)


class Replayed:
    """A call captured as a CUDA graph. What it raises while capturing says what cannot be captured."""

    def __init__(self, call: Callable[[], object]) -> None:
        call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = call()

    def __call__(self) -> None:
        self.graph.replay()
