"""Poisoned memory: what `torch.empty` and its like return is NaN until it is written."""

import torch
import torch.utils.deterministic


def poison_memory(on: bool = True) -> None:
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = True
