"""torchtitan's inner attention, over the ranks of a context group.

[Note: shapes] B batch, T local tokens, S global tokens, H query heads, G key/value heads, D head dim of q and k, V head
dim of v.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import local_map
from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.protocols.module import Module

from distflash.api import attention
from distflash.context import ContextParallel
from distflash.mask_algebra import Mask
from distflash.masks import Causal, Documents, Full, Window
from distflash.rows import Rows

# The configurations to replace.
_LAYERS = ["model_spec.model.layers.*"]


@dataclass(frozen=True)
class Batch:
    """Metadata of a batch, passed to each layer as ``attention_masks``.

    Attributes:
        cp: the ranks that hold its sequences.
        documents: packed documents; `Rows` if sequences differ; None for one document per sequence.
    """

    cp: ContextParallel
    documents: Documents | Rows | None

    def mask(self, window: Mask) -> Mask:
        """A layer's mask: ``window`` within each document."""
        return window if self.documents is None else window & self.documents


class RingAttention(FlexAttention):
    """Attention over all ranks' keys. Replaces ``FlexAttention`` and ``VarlenAttention``.

    A subclass of ``FlexAttention``, because torchtitan accepts no other class with context parallelism.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """window_size: (left, right) as in ``VarlenAttention``: keys before and after the query, -1 for all."""

        window_size: tuple[int, int] = (-1, 0)

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        self.window = window_of(*config.window_size)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_masks: Batch | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        score_mod: None = None,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attend. Overrides ``__call__`` because torchtitan wraps ``forward`` to all-gather the keys.

        Args:
            q: ``[B, T, H, D]``; k ``[B, T, G, D]``; v ``[B, T, G, V]``: local tensors, or DTensors of one placement.
            attention_masks: the batch's metadata, from `Trainer`.
            enable_gqa: ignored; GQA follows from the head counts.
            out_transform: takes out and the log-sum-exp ``[B, T, H]`` of this rank's queries, natural log, float32.

        Returns:
            ``[B, T, H, V]``, placed as q.

        Raises:
            ValueError: ``attention_masks`` is of torchtitan's own trainer, or ``score_mod`` is not None.
        """
        if not isinstance(attention_masks, Batch):
            raise ValueError(
                f"attention_masks: expected what distflash's Trainer makes of a batch, got {type(attention_masks)}; "
                "begin with config = context_parallel(config), which replaces torchtitan's trainer and validator too"
            )
        if score_mod is not None:
            attention_masks.cp.refuse("score_mod: is not supported, since scores are never written", in_attention=True)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask, cp = attention_masks.mask(self.window), attention_masks.cp
            out, lse = attention(q, k, v, mask=mask, cp=cp, scale=scale, return_lse=True)
            return out if out_transform is None else out_transform(out, lse.transpose(1, 2))

        if isinstance(q, DTensor):
            return on_local(attend, q, k, v)
        with spmd.no_typecheck():
            return attend(q, k, v)


def on_local(attend: Callable[[Tensor, Tensor, Tensor], Tensor], *operands: Any) -> Tensor:
    """``attend`` on the local tensors of q, k and v. Returns a DTensor placed as q."""
    placements = tuple(getattr(x, "placements", None) for x in operands)
    placed, mesh = placements[0], operands[0].device_mesh
    if len(set(placements)) > 1 or placed is None or any(p.is_partial() for p in placed):
        raise ValueError(f"q, k, v: expected DTensors of one placement, none of it Partial, got {placements}")
    return local_map(attend, (placed,), placements, placements, device_mesh=mesh)(*operands)


def window_of(left: int, right: int) -> Mask:
    """``window_size`` as a mask; -1 is unlimited."""
    if (left, right) in ((-1, -1), (-1, 0)):
        return Causal() if right == 0 else Full()
    return Window(*(sys.maxsize if side == -1 else side for side in (left, right)))


@override(target=FlexAttention.Config, fqns=_LAYERS, description="distflash: attention over context ranks")
def flex(config: Any) -> Any:
    """``FlexAttention`` becomes `RingAttention`."""
    return derive(config, RingAttention.Config, sharding_config=None)


@override(target=VarlenAttention.Config, fqns=_LAYERS, description="distflash: attention over context ranks")
def varlen(config: Any) -> Any:
    """``VarlenAttention`` becomes `RingAttention` with its window."""
    return derive(config, RingAttention.Config, sharding_config=None)
