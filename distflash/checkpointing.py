"""Activation checkpointing that does not recompute attention.

Recomputing attention would send K and V again, and its backward needs only ``out`` and ``lse``, which are small. So
these two are kept, and everything else is recomputed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from distflash import ops


def checkpoint_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy for `torch.utils.checkpoint.create_selective_checkpoint_contexts`: keep attention, recompute the rest.

    For those who keep more: ask this one in a policy of your own.

    Examples:
        >>> from functools import partial
        >>> from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
        >>> def policy(ctx, op, *args, **kwargs):  # products of matrices, too
        ...     if op is torch.ops.aten.mm.default:
        ...         return CheckpointPolicy.MUST_SAVE
        ...     return df.checkpoint_policy(ctx, op, *args, **kwargs)
        >>> contexts = partial(create_selective_checkpoint_contexts, policy)
        >>> layer = df.nn.SelfAttention(64, heads=4, cp=df.ContextParallel(dist.group.WORLD))
        >>> checkpoint(layer, torch.randn(1, 10, 64), use_reentrant=False, context_fn=contexts).sum().backward()
    """
    kept = op is ops.ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keep_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The ``context_fn`` of `torch.utils.checkpoint.checkpoint`, made of `checkpoint_policy`.

    Each `attention` inside keeps its out, ``[batch, seq_local, heads, d_v]`` in q's dtype, and its lse,
    ``[batch, heads, seq_local]`` in float32, and is not run again in backward. Needs ``use_reentrant=False``.

    Examples:
        >>> from torch.utils.checkpoint import checkpoint
        >>> cp = df.ContextParallel(dist.group.WORLD)
        >>> layer = df.nn.SelfAttention(64, heads=4, cp=cp)
        >>> x = torch.randn(1, 10, 64)
        >>> checkpoint(layer, x, use_reentrant=False, context_fn=df.keep_attention).sum().backward()
    """
    forward, recompute = create_selective_checkpoint_contexts(checkpoint_policy)
    if torch.compiler.is_compiling():  # the compiler wants to hear of every operation
        return forward, recompute
    return _OnlyAttention(forward), _OnlyAttention(recompute)


class _OnlyAttention(TorchDispatchMode):
    """One of torch's selective contexts, told of no operation but attention.

    torch's selective mode requires the same operations in backward as in forward. ZeRO-3's gathers of weights differ.
    """

    def __init__(self, selective: TorchDispatchMode) -> None:
        super().__init__()
        self.selective = selective

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ops.ATTENTION:
            return self.selective.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs unchanged under this mode."""
        return True
