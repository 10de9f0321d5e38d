"""A ring of messages, to check their content and to measure the bandwidth to the next rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch

from distflash.doctor.findings import Finding
from distflash.transport import Distributed
from distflash.transport.base import Message

SIZES = (1, 16, 128)  # MiB
REPETITIONS = 3


def messages(ranks: Distributed, device: torch.device) -> Iterator[Finding]:
    """Every rank sends to the next rank while it receives from the previous one, as in ring attention."""
    after, before = ((ranks.rank + step) % ranks.world_size for step in (1, -1))
    rates, damaged = [], []
    for mebibytes in SIZES:
        sent = torch.full((mebibytes * 2**18,), ranks.rank, dtype=torch.int32, device=device)
        received = torch.full_like(sent, -1)
        seconds = []
        for _ in range(1 + REPETITIONS):  # the first opens the connection and is not measured
            _finish(device)
            start = time.perf_counter()
            ranks.exchange([Message(sent, after)], [Message(received, before)]).wait()
            _finish(device)
            seconds.append(time.perf_counter() - start)
        if not bool((received == before).all()):
            damaged.append(f"{mebibytes} MiB")
        rates.append(f"{mebibytes / 1024 / median(seconds[1:]):.2f}")
    rate = f"{' / '.join(rates)} GiB/s with {' / '.join(map(str, SIZES))} MiB"
    yield Finding(f"rank {ranks.rank} to rank {after}", rate)
    if damaged:
        yield Finding(
            f"rank {before} to rank {ranks.rank}",
            f"messages of {', '.join(damaged)} did not arrive as they were sent",
            "run NVIDIA's nccl-tests between these ranks; a link, a driver or NCCL damages data",
        )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
