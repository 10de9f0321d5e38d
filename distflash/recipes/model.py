"""A byte-level decoder in the style of Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Only attention depends on ranks, through `cp`. All other layers act on each token separately.
Shapes: B sequences, T tokens on this rank, V entries of the vocabulary.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distflash as df
from distflash.recipes.config import VOCABULARY, ModelConfig


class RMSNorm(nn.Module):
    """Normalises in float32 and returns the compute type, so that the linear layers after it share one copy."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-5).to(dtype)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, cp: df.ContextParallel | None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim)
        self.attention = df.nn.SelfAttention(
            config.dim, config.heads, config.kv_heads, rope_theta=config.rope_theta, mask=df.Causal(), cp=cp
        )
        self.ffn_norm = RMSNorm(config.dim)
        self.ffn = SwiGLU(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, seq_len: int, mask: df.Mask | None = None, cache: df.Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), seq_len=seq_len, mask=mask, cache=cache)
        return x + self.ffn(self.ffn_norm(x))

    def decode(self, x: Tensor, cache: df.Cache) -> Tensor:
        x = x + self.attention.decode(self.attention_norm(x), cache=cache)
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nn.Module):
    """Tokens [B, T] to logits [B, T, V], causal unless another mask is given.

    `cp=None` is the same model with the whole sequence on one device.
    """

    def __init__(self, config: ModelConfig, cp: df.ContextParallel | None = None) -> None:
        super().__init__()
        self.config, self.cp = config, cp
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config, cp) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Normal weights with std 0.02; smaller for outputs of a block, so that the residual stream does not grow."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor, seq_len: int, mask: df.Mask | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = self.run(block, x, seq_len, mask)
        return self.head(self.norm(x))

    def caches(self, capacity: int, dtype: torch.dtype, batch: int = 1) -> list[df.Cache]:
        """An empty cache for each block, for sequences of up to `capacity` tokens."""
        sizes = dict(batch=batch, kv_heads=self.config.kv_heads, d_qk=self.config.head_dim, capacity=capacity)
        device = self.embedding.weight.device
        return [df.Cache(self.cp, **sizes, dtype=dtype, device=device) for _ in self.blocks]

    def prefill(self, tokens: Tensor, seq_len: int, caches: list[df.Cache]) -> Tensor:
        """A chunk of the next `seq_len` tokens of each sequence, sharded to [B, T]; returns logits [B, T, V]."""
        x = self.embedding(tokens)
        for block, cache in self.with_caches(caches):
            x = block(x, seq_len, cache=cache)
        return self.head(self.norm(x))

    def decode(self, tokens: Tensor, caches: list[df.Cache]) -> Tensor:
        """A few tokens [B, n], the same on every rank; returns logits [B, n, V], the same bits on every rank."""
        x = self.embedding(tokens)
        for block, cache in self.with_caches(caches):
            x = block.decode(x, cache)
        return self.head(self.norm(x))

    def with_caches(self, caches: list[df.Cache]) -> Iterator[tuple[Block, df.Cache]]:
        for block, cache in zip(self.blocks, caches, strict=True):
            assert isinstance(block, Block)
            yield block, cache

    def run(self, block: nn.Module, x: Tensor, seq_len: int, mask: df.Mask | None) -> Tensor:
        """One block, with activation checkpointing if the options ask for it."""
        if not self.config.checkpoint_activations:
            return block(x, seq_len, mask)
        again = partial(checkpoint, block, x, seq_len, mask, use_reentrant=False, preserve_rng_state=False)
        return again() if self.config.recompute_attention else again(context_fn=df.keep_attention)


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, in float32: logits [B, T, V], labels [B, T] -> scalar."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")


def flops_per_token(config: ModelConfig, seq_len: int, vocabulary: int = VOCABULARY) -> float:
    """Model FLOPs of training per token, averaged over a causal sequence of `seq_len` tokens.

    Forward: 2 per matrix weight (the embedding is a look-up), and 4 * head_dim per head and allowed (query, key) pair,
    of which there are S (S + 1) / 2. Backward: twice as many. Recomputation is not counted.
    """
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention = config.dim * (2 * q_dim + 2 * kv_dim)
    weights = config.layers * (attention + 3 * config.dim * config.ffn_dim) + config.dim * vocabulary
    pairs_per_token = (seq_len + 1) / 2
    forward = 2 * weights + config.layers * 4 * q_dim * pairs_per_token
    return 3 * forward
