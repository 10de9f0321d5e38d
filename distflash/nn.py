"""Modules: self-attention of decoders over a sharded sequence.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from math import inf
from numbers import Real

import torch
from einops import rearrange
from torch import Tensor, nn

from distflash import validation
from distflash.api import attention
from distflash.cache import Cache
from distflash.context import ALONE, ContextParallel
from distflash.decode_step import decode
from distflash.heads import pool_heads
from distflash.mask_algebra import Mask
from distflash.masks import Causal, Full
from distflash.prefill import cache_problem

__all__ = ["RotaryEmbedding", "SelfAttention", "pool_heads"]


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (https://arxiv.org/abs/2104.09864), which rotates halves as Llama does.

    It takes global positions, so a rank's tokens are rotated as in the unsharded sequence.

    Args:
        head_dim: an even number.
        theta: the base of the wavelengths, a positive number.

    Raises:
        ValueError: an argument has the wrong type.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD)
        >>> rope = df.nn.RotaryEmbedding(64)
        >>> q, k = rope(torch.randn(1, 10, 8, 64), torch.randn(1, 10, 2, 64), cp.positions(20))
        >>> q.shape, k.shape
        (torch.Size([1, 10, 8, 64]), torch.Size([1, 10, 2, 64]))
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        _require_count("head_dim", head_dim)
        if head_dim % 2:
            raise ValueError(f"head_dim: rotary embedding needs an even head_dim, got {head_dim}; or rope_theta=None")
        if not isinstance(theta, Real) or not 0 < theta < inf:
            raise ValueError(f"rope_theta: expected a positive number such as 10000.0, got {theta!r}")
        self.head_dim: int = head_dim
        self.theta: float = float(theta)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate ``q [B, T, H, D]`` and ``k [B, T, G, D]`` by ``positions``, int64 ``[T]`` or ``[B, T]``.

        Raises:
            ValueError: shapes do not match (positions of another length would be broadcast silently).
        """
        for name, x in (("q", q), ("k", k)):
            if x.dim() != 4 or x.shape[3] != self.head_dim:
                raise ValueError(
                    f"{name}: expected [batch, tokens, heads, head_dim={self.head_dim}], got {list(x.shape)}"
                )
        _require_positions(positions, q.shape[0], q.shape[1])
        # float64: at position 2^20, float32 resolves angles of the shortest wavelength only to 1/16 radian.
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=q.device) / self.head_dim
        angles = positions.to(torch.float64)[..., None] * self.theta**-exponents
        wide = torch.promote_types(q.dtype, torch.float32)
        cos, sin = (f(angles).to(wide)[..., None, :] for f in (torch.cos, torch.sin))
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _require_positions(positions: Tensor, batch: int, tokens: int) -> None:
    fits = isinstance(positions, Tensor) and positions.dim() in (1, 2) and positions.shape[-1] == tokens
    if fits and positions.dim() == 2:
        fits = positions.shape[0] == 1 or positions.shape[0] == batch
    # The message is formatted only if needed: under torch.compile, formatting a length would specialise it.
    if not fits or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"positions: expected integers [{tokens}] or [{batch}, {tokens}], global positions of q's tokens, got "
            f"{validation.came(positions)}; cp.positions(seq_len) gives them"
        )


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal self-attention with grouped query heads and RoPE from global positions.

    Args:
        dim: width of the model.
        heads: query heads.
        kv_heads: key/value heads, a divisor of ``heads``; by default as many.
        head_dim: by default ``dim // heads``.
        rope_theta: base of the rotary embedding; None for none.
        mask: which keys a query sees; `forward` can override it.
        dropout_p: attention dropout, in training mode; `forward` then needs a ``dropout_seed``.
        cp: the group that holds the sequence; None: this device holds all of it.

    Raises:
        ValueError: an argument has the wrong type, or the numbers of heads do not match.

    Examples:
        >>> layer = df.nn.SelfAttention(64, heads=4, kv_heads=2, cp=df.ContextParallel(dist.group.WORLD))
        >>> layer(torch.randn(1, 10, 64)).shape  # this rank's tokens of 20
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        rope_theta: float | None = 10000.0,
        mask: Mask = Causal(),
        dropout_p: float = 0.0,
        cp: ContextParallel | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        for name, count in (("dim", dim), ("heads", heads), ("kv_heads", kv_heads)):
            _require_count(name, count)
        problem = validation.mask_problem(mask) or validation.numbers_problem(None, None, dropout_p)
        if problem is not None:
            raise ValueError(problem)
        if cp is not None and not isinstance(cp, ContextParallel):
            raise ValueError(f"cp: expected a ContextParallel or None, got {cp!r}; make one: df.ContextParallel(group)")
        if head_dim is None and dim % heads:
            raise ValueError(f"heads: {heads} does not divide dim={dim}; choose another or give head_dim")
        if heads % kv_heads:
            raise ValueError(f"kv_heads: {kv_heads} does not divide heads={heads}")
        self.heads, self.kv_heads = heads, kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        _require_count("head_dim", self.head_dim)
        self.mask, self.dropout_p, self.cp = mask, dropout_p, cp
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.rope = None if rope_theta is None else RotaryEmbedding(self.head_dim, rope_theta)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | None = None,
        seq_len: int | None = None,
        cache: Cache | None = None,
        dropout_seed: int | Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: ``[B, T, dim]``, this rank's tokens in ascending global position.
            mask: in place of the module's mask.
            seq_len: the global length; may be left out if all ranks hold the same number of tokens, or if the mask
                knows it.
            cache: this layer's keys and values of earlier tokens. x is then the next chunk of every sequence, sharded
                on its own, and ``seq_len`` the number of its tokens; see `attention`. No gradient.
            dropout_seed: as in `attention`: the same on all ranks, new in each layer and step. Not read in evaluation
                mode.

        Returns:
            ``[B, T, dim]``.

        Raises:
            ValueError: ``x`` is not sharded or has another shape, and all errors of `attention`.
        """
        mask = self.mask if mask is None else mask
        self._require_fit(x, mask, cache)
        q, k, v = self._project(x)
        if self.rope is not None:
            # The mask is over the cache and the chunk, the layout over the chunk alone, whose positions follow the
            # cache.
            local = self._positions(x, mask if cache is None else Full(), seq_len)
            q, k = self.rope(q, k, local if cache is None else cache.store.lengths[:, None] + local)
        cp = self.cp if cache is None else None  # that of the cache, which fits
        p = self.dropout_p if self.training else 0.0
        out = attention(q, k, v, mask=mask, cp=cp, seq_len=seq_len, cache=cache, dropout_p=p, dropout_seed=dropout_seed)
        return self._join(out)

    def decode(self, x: Tensor, *, cache: Cache, mask: Mask | None = None) -> Tensor:
        """Attention of a few new tokens, which every rank has, over the cache and themselves.

        On GPUs there is no synchronisation, also for positions, so a step can be captured in a CUDA graph.

        Args:
            x: ``[B, n, dim]``, the same values on every rank.
            cache: this layer's keys and values of earlier tokens. Those of x are appended.
            mask: in place of the module's mask.

        Returns:
            ``[B, n, dim]``, the same bits on every rank.

        Raises:
            ValueError: ``x`` has another shape, and all errors of `distflash.decode`.
        """
        mask = self.mask if mask is None else mask
        self._require_fit(x, mask, cache, decoding=True)
        q, k, v = self._project(x)
        if self.rope is not None:
            local = torch.arange(x.shape[1], device=x.device)
            q, k = self.rope(q, k, cache.store.lengths[:, None] + local)
        return self._join(decode(q, k, v, cache=cache, mask=mask))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = "batch tokens (heads dim) -> batch tokens heads dim"
        q, k, v = (rearrange(p(x), split, dim=self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def _join(self, out: Tensor) -> Tensor:
        return self.o_proj(rearrange(out, "batch tokens heads dim -> batch tokens (heads dim)"))

    def _require_fit(self, x: object, mask: object, cache: object, decoding: bool = False) -> None:
        dim = self.q_proj.in_features
        problem = validation.mask_problem(mask) or validation.tokens_problem(x)
        if problem is None:
            assert isinstance(x, Tensor)
            if x.dim() != 3 or x.shape[2] != dim or not x.is_floating_point():
                problem = f"x: expected a floating-point tensor [batch, seq_local, dim={dim}], got {validation.came(x)}"
            elif decoding or cache is not None:
                problem = self._cache_problem(x, cache)
        if problem is not None and self.cp is not None:
            self.cp.refuse(problem, in_attention=True)
        if problem is not None:
            raise ValueError(problem)

    def _cache_problem(self, x: Tensor, cache: object) -> str | None:
        """What is wrong with a cache for positions; `attention` and `decode` check the rest."""
        if (problem := cache_problem(cache, self_attention=True)) is not None:
            return problem
        assert isinstance(cache, Cache)
        cp = ALONE if self.cp is None else self.cp
        if cache.cp is not cp and not cache.cp.world_size == cp.world_size == 1:
            return f"cache: was made with {cache.cp!r}, the module with cp={self.cp!r}; make both with the same"
        if cache.batch != x.shape[0]:
            return (
                f"x: is for {x.shape[0]} sequences, the cache for {cache.batch}; take one sequence of it with cache[n]"
            )
        return None

    def _positions(self, x: Tensor, mask: Mask, seq_len: int | None) -> Tensor:
        if self.cp is None:
            return torch.arange(x.shape[1], device=x.device)
        return self.cp.positions_of(x, seq_len, mask)
