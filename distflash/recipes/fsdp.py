"""FSDP2: weights, gradients and optimizer state in equal parts on all ranks, data x context alike.

Context parallelism shards activations and nothing else, so its ranks shard the model like any data-parallel ones do.
FSDP averages gradients over them, and `cp.mean(..., reduction="mean")` brings that average to the gradient of the loss.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distflash.recipes.model import Decoder


def shard_model(model: Decoder, compute_dtype: torch.dtype) -> None:
    """Shard the model over all ranks, in place. Blocks are gathered one at a time, and in the compute type."""
    mesh = init_device_mesh(model.head.weight.device.type, (dist.get_world_size(),))
    # Their inputs, the residual stream, stay in float32.
    blocks = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=blocks)
    fully_shard(model, mesh=mesh)


def end_forward(model: Decoder) -> None:
    """Shard again what a forward without a backward leaves whole: zero_grad would miss the sharded gradients."""
    if isinstance(model, FSDPModule):
        model.reshard()


class ShardedGradients:
    """The gradients of a model that FSDP has sharded, averaged over all ranks when backward returns."""

    reduction: Literal["mean"] = "mean"

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def zero(self) -> None:
        self.model.zero_grad()

    def combine(self) -> None:
        """FSDP has done it."""

    def clip(self, limit: float) -> Tensor:
        """Scale to a norm of at most `limit` (0: leave as it is) and return the norm before, over all parts."""
        return whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit if limit > 0 else torch.inf))


def whole(x: Tensor) -> Tensor:
    """The tensor that ranks hold in parts. All ranks must call."""
    return x.full_tensor() if isinstance(x, DTensor) else x
