"""Bytes moved and memory of each schedule, counted without data and without a GPU.

    python -m benchmarks.schedules

Prints the tables of ``docs/schedules.md``. Every rank runs the package's own forward and backward on tensors of the
meta device, with a transport that counts what arrives and a kernel that computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from random import Random

import torch
from torch import Tensor

import distflash as df
from benchmarks.meter import Meter
from distflash import attend
from distflash.given import Given, Options
from distflash.kernels.base import BackwardContext, Kernel, KeyGradient, Keys, Problem, QueryGradient, Scores
from distflash.partial import Partial
from distflash.plan import Pass
from distflash.transport import Message

META = torch.device("meta")
MIB = 2**20


@dataclass(frozen=True)
class Hollow(Kernel):
    """Allocates what the portable kernel does, and computes nothing."""

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        return []

    def forward(self, q: Tensor, keys: tuple[Keys, ...], each: Pass, scores: Scores, into: Partial) -> None:
        pass

    def preprocess(self, q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> BackwardContext:
        statistics = lse.new_empty(2, *lse.shape)
        return BackwardContext(q, dout, lse, statistics[1], statistics)

    def backward(
        self, saved: BackwardContext, keys: Keys, each: Pass, scores: Scores, dq: QueryGradient, dkv: KeyGradient
    ) -> None:
        pass


class Arrived:
    """Messages that are complete at once."""

    def wait(self) -> None:
        pass


@dataclass
class Counting:
    """One rank's transport: counts what it receives, by peers. The other ranks are not there."""

    rank: int
    shape: tuple[int, ...]
    device: torch.device = META
    verifies_every_call: bool = False
    intra_node: bool = False
    received: dict[int, int] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return prod(self.shape)

    def supports_device(self, device: torch.device) -> bool:
        return True

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Arrived:
        for message in receives:
            size = message.tensor.numel() * message.tensor.element_size()
            self.received[message.peer] = self.received.get(message.peer, 0) + size
        return Arrived()

    def gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        return [list(values)] * self.world_size


@dataclass(frozen=True)
class Case:
    """One attention call of bfloat16 tensors over the ranks of a mesh."""

    name: str
    mask: df.Mask
    layout: df.Layout
    seq_len: int
    q_len: int | None = None  # the last so many tokens are the queries
    shape: tuple[int, ...] = (4,)
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def world_size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Counted:
    """What one rank receives, by peers, and its most memory beyond inputs and results, in bytes."""

    received: dict[int, int]
    memory: int


def count(case: Case, schedule: df.schedules.Schedule, rank: int) -> tuple[Counted, Counted]:
    """Forward and backward of one rank."""
    transport = Counting(rank, case.shape)
    cp = df.ContextParallel(transport, case.layout, schedule, Hollow())
    S, q_len = case.seq_len, case.q_len or case.seq_len
    T, K = (case.layout.length(n, case.world_size, rank) for n in (q_len, S))
    q, k, v, dout = (
        torch.empty(1, n, h, case.dim, dtype=torch.bfloat16, device=META)
        for n, h in ((T, case.heads), (K, case.kv_heads), (K, case.kv_heads), (T, case.heads))
    )
    given = Given([S, S - q_len, -1 if case.q_len is None else q_len])
    call, _ = cp.calls.recipe(case.mask, Options()).prepared(q, k, v, given, True).forward_call(given)
    with Meter() as meter:
        meter.ignore(q, k, v, dout)
        out, lse, _ = attend.forward(q, k, v, call)
    forward = Counted(dict(transport.received), meter.peak - _size(out, lse))
    transport.received.clear()
    with Meter() as meter:
        meter.ignore(q, k, v, dout, out, lse)
        dq, dk, dv, _ = attend.backward(dout, None, q, k, v, out, lse, call)
    return forward, Counted(dict(transport.received), meter.peak - _size(dq, dk, dv))


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def documents(seq_len: int, seed: int = 0) -> df.Mask:
    """Packed documents of 256 to 32K tokens, short ones as frequent as long ones on a logarithmic scale."""
    random, lengths = Random(seed), []
    while sum(lengths) < seq_len:
        lengths.append(min(int(2 ** random.uniform(8, 15)), seq_len - sum(lengths)))
    return df.Causal() & df.Documents([0, *accumulate(lengths)])


S = 128 * 1024
CASES = (
    Case("causal, zigzag", df.Causal(), df.Zigzag(), S),
    Case("window of 4K, contiguous", df.Causal() & df.Window(4095), df.Contiguous(), S),
    Case("window of 4K, zigzag", df.Causal() & df.Window(4095), df.Zigzag(), S),
    Case("packed documents, zigzag", documents(S), df.Zigzag(), S),
    Case("last 4K as queries, zigzag", df.Causal(), df.Zigzag(), S, 4096),
)
VOLUMES = "| schedule | forward | backward | memory forward | memory backward |\n|---|---|---|---|---|"
CROSSING = "| schedule | all | between nodes | most of one rank |\n|---|---|---|---|"
SCHEDULES = (df.Ring(), df.AllGather(2), df.DoubleRing(2), df.Ulysses(), df.PassQuery())


def volumes() -> None:
    """Bytes that arrive at a rank, the mean over 4 ranks, and the most memory that a rank takes."""
    for case in CASES:
        print(f"\n{case.name}\n\n{VOLUMES}")
        for schedule in SCHEDULES:
            ranks = [count(case, schedule, rank) for rank in range(case.world_size)]
            moved = [sum(sum(r[n].received.values()) for r in ranks) / len(ranks) for n in (0, 1)]
            memory = [max(r[n].memory for r in ranks) for n in (0, 1)]
            cells = " | ".join(f"{x / MIB:.0f}" for x in (*moved, *memory))
            print(f"| `{schedule!r}` | {cells} |")


def between_nodes() -> None:
    """Bytes of a forward that cross from node to node: 2 nodes of 4 ranks, causal, zigzag."""
    mesh = Case("", df.Causal(), df.Zigzag(), S, shape=(2, 4))
    line = Case("", df.Causal(), df.Zigzag(), S, shape=(8,))
    rows = ((df.Ring(), line), (df.AllGather(2), line), (df.DoubleRing(4), line), (df.Ulysses(df.Ring()), mesh))
    print(f"\nbetween nodes\n\n{CROSSING}")
    for schedule, case in rows:
        received = [count(case, schedule, rank)[0].received for rank in range(8)]
        crossing = [sum(n for peer, n in of.items() if peer // 4 != r // 4) for r, of in enumerate(received)]
        cells = sum(sum(of.values()) for of in received), sum(crossing), max(crossing)
        print(f"| `{schedule!r}` | {' | '.join(f'{x / MIB:.0f}' for x in cells)} |")


if __name__ == "__main__":
    volumes()
    between_nodes()
