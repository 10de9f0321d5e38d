"""Poisoned memory: `torch.empty` and similar functions return NaN."""

import torch
import torch.utils.deterministic


def poison_memory(on: bool = True, warn_only: bool = False) -> None:
    """``warn_only``: where what is not deterministic may run all the same."""
    torch.use_deterministic_algorithms(on, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = True
