"""From the host's memory to a device's, without waiting for what the device has been given before."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``. From memory that is not pinned, a copy to a GPU may wait for all that is queued there."""
    device = torch.device(device)
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
