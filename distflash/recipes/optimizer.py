"""AdamW, its learning rate, and gradients in one flat buffer, for a single all-reduce and a single norm."""

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distflash.recipes.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step 0 <= step < steps: linear warm-up, then a cosine down to min_lr_ratio."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - 1 - config.warmup)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def share_of_lr(config: OptimizerConfig, step: int, steps: int) -> float:
    """`learning_rate` over the highest one. Defined for the step after the last too, which schedulers ask for."""
    return learning_rate(config, min(step, steps - 1), steps) / config.lr


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on the gains of norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


class Gradients:
    """The float32 gradients of all parameters as views of one flat buffer, into which autograd adds."""

    reduction: Literal["sum"] = "sum"

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        self.flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
        for parameter, view in zip(parameters, self.flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = view.view_as(parameter)

    def zero(self) -> None:
        self.flat.zero_()

    def combine(self) -> None:
        """Sum over ranks: each has the gradient of its own tokens' part of the global mean."""
        if dist.get_world_size() > 1:
            dist.all_reduce(self.flat)

    def clip(self, limit: float) -> Tensor:
        """Clip the norm to `limit` (0: no clipping) and return the norm before.

        After `combine` every rank has the same gradients, so the same norm.
        """
        norm = torch.linalg.vector_norm(self.flat)
        if limit > 0:
            self.flat.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm
