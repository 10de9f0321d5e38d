"""Is the sharded step exact? Replay one batch unsharded, and compare the loss, outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distflash.api import ContextParallel
from distflash.differences import Report
from distflash.transport import Transport


def verify(
    step: Callable[[Any, ContextParallel | None], Any],
    batch: Any,
    cp: ContextParallel,
    *,
    model: nn.Module | None = None,
    reduction: Literal["sum", "mean"] | None = None,
    group: dist.ProcessGroup | DeviceMesh | Transport | None = None,
    quiet: bool = False,
) -> Report:
    """Compare one sharded step with its unsharded replay. All ranks of the group must call.

    ``step(batch, cp)`` is run sharded once; then every rank runs ``step(batch, None)`` on the whole batch, so that DDP,
    FSDP and ZeRO, whose forward and backward are collective, take part as they are.

    Args:
        step: ``step(batch, cp)`` returns the loss of the whole batch, a scalar, the same on every rank. Given a group
            it shards the batch (`ContextParallel.shard`); given None it computes the same on the whole batch, and sends
            nothing of its own. It may call ``backward`` itself, else verify does. It neither clips gradients (clipping
            hides factors) nor changes weights. It may return a tuple of the loss and further tensors to compare.
        batch: the whole batch, the same on every rank.
        cp: the group that holds the sequence. Modules that hold it in an attribute, as `distflash.nn.SelfAttention`
            does, have None there during the replay.
        model: the module whose parameters, layers and output are compared; by default those that step calls.
        reduction: how gradients are combined over the ranks after step returns: "sum" or "mean"; None where step, DDP,
            FSDP or ZeRO has combined them by then. Gradients that differ between ranks are added up then, and the
            report says so.
        group: with data parallelism all ranks of data x context, as in `ContextParallel.mean`; by default those of cp.
        quiet: print nothing. Otherwise the first rank prints the report.

    Returns:
        The report, the same on every rank. A difference raises nothing: see `Report.ok` and `Report.require`.

    Raises:
        ValueError: an argument is of another kind, or step does not keep its contract; on every rank.
        RuntimeError: another rank raised; its words are in the message. That rank raises its own error.
    """
    raise NotImplementedError
