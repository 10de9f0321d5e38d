"""The arguments of a call besides q, k, v and the mask.

[Note: shapes] H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from distflash.layouts import Layout


@dataclass(frozen=True)
class Given:
    """The lengths and the optional tensors of a call.

    Attributes:
        lengths: ``(seq_len, q_start, q_len)``, with -1 for None.
        sinks: ``[H]`` or None.
        alibi_slopes: ``[H]`` or None.
        dropout_seed: int64 ``[]``, on the call's device, or None.
    """

    lengths: Sequence[int]
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    dropout_seed: Tensor | None = None

    @cached_property
    def is_plain(self) -> bool:
        """Whether it has none of these tensors."""
        return self.sinks is None and self.alibi_slopes is None and self.dropout_seed is None


# The arguments of a call whose lengths are known already, and which has no other tensors.
PLAIN = Given(())


@dataclass(frozen=True)
class Options:
    """The arguments of a call that are no tensors, besides mask and lengths; see `attention`.

    ``layout`` is that of this batch, if it is not the group's; see `ContextParallel.with_mask`.
    """

    scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    kv_layout: Layout | None = None
    layout: Layout | None = None
    max_logits: bool = False


class Signature(NamedTuple):
    """What a call depends on of its tensors and lengths: the key of what is prepared for it."""

    q: torch.Size
    k: torch.Size
    v: torch.Size
    dtype: torch.dtype
    device: torch.device
    lengths: tuple[int, ...]
    sinks: bool
    alibi: bool
    needs_grad: bool
