"""The mean loss over all ranks' labels, for ``model.loss_function``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distflash.context import ContextParallel
from distflash.integrations.labels import IGNORED
from distflash.integrations.transformers.batch import PASS_ALL, Shard


def loss_function(
    cp: ContextParallel,
    reduction: Literal["sum", "mean"] = "mean",
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> CausalLMLoss:
    """Make a loss for ``model.loss_function``: the mean over all ranks' labels, the same on every rank.

    Args:
        cp: as for `shard_batch`.
        reduction, group: as for `ContextParallel.mean`. With data parallelism, ``group`` is all of data x context.

    Returns:
        ``(logits [B, T, V], labels, vocab_size, shift_labels [B, T]) -> scalar``, cross-entropy in float32.
    """
    return CausalLMLoss(cp, reduction, group)


@dataclass(frozen=True)
class CausalLMLoss:
    """The result of `loss_function`."""

    cp: ContextParallel
    reduction: Literal["sum", "mean"]
    group: dist.ProcessGroup | DeviceMesh | None

    def __call__(
        self,
        logits: Tensor,
        labels: Any = None,
        vocab_size: int | None = None,
        *,
        shift_labels: Tensor | None = None,
        distflash: Shard | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None or distflash is None:
            raise ValueError(f"batch: was not sharded, or had no labels; {PASS_ALL}")
        distflash.require_attended()
        targets = shift_labels.to(logits.device).flatten()
        total = F.cross_entropy(logits.float().flatten(0, -2), targets, ignore_index=IGNORED, reduction="sum")
        return self.cp.mean(total, (targets != IGNORED).sum(), reduction=self.reduction, group=self.group)
