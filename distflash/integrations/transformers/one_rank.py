"""Keeps generation in step over ranks: random and time-based decisions are rank 0's.

Rank 0 sends its logits and random state with every step, so every rank samples the same tokens and stops at the same
one, even if ranks were seeded or round differently.
"""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria, StoppingCriteria
from transformers.generation import GenerationMixin

from distflash.context import ContextParallel
from distflash.transport import Message, Transport


class DecidedByOneRank(StoppingCriteria):
    """A criterion for ``generate(stopping_criteria=[...])`` that rank 0 evaluates for all, such as a time limit.

        model.generate(ids, past_key_values=cache, stopping_criteria=[DecidedByOneRank(MaxTimeCriteria(60.0), cp)])

    Criteria that depend on tokens only do not need it.

    Args:
        criterion: evaluated on rank 0 only.
        cp: the group that `register` was given.
    """

    def __init__(self, criterion: StoppingCriteria, cp: ContextParallel) -> None:
        self.criterion, self.cp = criterion, cp

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        """Bool ``[B]``: which sequences are done."""
        done = torch.zeros(len(input_ids), dtype=torch.uint8, device=self.cp.transport.device)
        if self.cp.rank == 0:
            done[:] = torch.as_tensor(self.criterion(input_ids, scores, **others), device=done.device)
        return _of_rank_zero(done, self.cp.transport, "whether to stop").bool().to(input_ids.device)


def follow(logits: Tensor | None, cp: ContextParallel) -> None:
    """Copy rank 0's logits, in place, and its random state. All ranks call."""
    if logits is not None:
        logits.copy_(_of_rank_zero(logits.detach(), cp.transport, "logits"))
    follow_random_state(cp)


def follow_random_state(cp: ContextParallel) -> None:
    """Copy rank 0's random state, of the CPU and of the device. All ranks call."""
    if cp.world_size == 1:
        return
    device = cp.transport.device
    own = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else own[:0]
    state = _of_rank_zero(torch.cat([own, on_device]).to(device), cp.transport, "random state")
    if cp.rank == 0:
        return
    cpu, gpu = state.cpu().split([len(own), len(on_device)])
    torch.set_rng_state(cpu.clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(gpu.clone(), device)


def generating() -> FrameType | None:
    """The frame of a running ``generate``, or None."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def clock_problem(cp: ContextParallel) -> str | None:
    """Check that a running ``generate`` has no time limit of each rank's own clock."""
    frame = generating() if cp.world_size > 1 else None
    if frame is None:
        return None
    config, criteria = frame.f_locals.get("generation_config"), frame.f_locals.get("stopping_criteria") or ()
    if getattr(config, "max_time", None) is None and not any(isinstance(each, MaxTimeCriteria) for each in criteria):
        return None
    return (
        "max_time: every rank has a clock of its own, so that one would stop while the others wait for it. Pass "
        "stopping_criteria=[DecidedByOneRank(MaxTimeCriteria(seconds), cp)], or max_new_tokens"
    )


def _of_rank_zero(x: Tensor, transport: Transport, what: str) -> Tensor:
    if transport.world_size == 1:
        return x
    if transport.rank == 0:
        x = x.contiguous().resolve_neg()
        transport.exchange([Message(x, peer, what) for peer in range(1, transport.world_size)], []).wait()
        return x
    into = torch.empty_like(x, memory_format=torch.contiguous_format)
    transport.exchange([], [Message(into, 0, what)]).wait()
    return into


def logits_of(output: Any) -> Tensor | None:
    """A model's logits, or None."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None
