"""FSDP2: weights, gradients and optimizer state sharded over all data x context ranks.

Context parallelism shards activations only, so FSDP treats context ranks like data-parallel ranks. It averages
gradients over all of them; with `cp.mean(..., reduction="mean")` that average is the gradient of the loss.
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
    """Shard the model over all ranks, in place. Blocks are gathered one at a time, in the compute type."""
    mesh = init_device_mesh(model.head.weight.device.type, (dist.get_world_size(),))
    # Inputs of blocks, the residual stream, stay in float32.
    blocks = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=blocks)
    fully_shard(model, mesh=mesh)


def end_forward(model: Decoder) -> None:
    """Reshard after a forward without a backward: otherwise zero_grad would miss the sharded gradients."""
    if isinstance(model, FSDPModule):
        model.reshard()


class ShardedGradients:
    """The gradients of a model under FSDP, which backward averages over all ranks."""

    reduction: Literal["mean"] = "mean"

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def zero(self) -> None:
        self.model.zero_grad()

    def combine(self) -> None:
        """Nothing to do: FSDP has reduced them."""

    def clip(self, limit: float) -> Tensor:
        """Clip the global norm to `limit` (0: no clipping) and return the norm before."""
        return whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit if limit > 0 else torch.inf))


def whole(x: Tensor) -> Tensor:
    """The full tensor of a DTensor. All ranks must call."""
    return x.full_tensor() if isinstance(x, DTensor) else x
