"""Copies from the host to a device without a synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``, by pinned memory: a copy of pageable memory may wait for all work queued on the GPU."""
    device = torch.device(device)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
