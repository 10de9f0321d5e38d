"""What becomes of the other ranks when one fails: real processes, one of which dies, raises, hangs or comes late.

`tests/distributed/test_faults.py` asserts it on gloo, `tests/gpu/test_faults.py` on NCCL. As a script this measures
every phase and fault at 2, 3 and 4 ranks on gloo, and what the guard costs, and writes both into docs/reliability.md:

    OMP_NUM_THREADS=1 python -m tests.faults
"""

from __future__ import annotations

import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import distflash as df
from distflash.transport import Message, during
from tests.ranks import Ranks, Reply

TIMEOUT = 2.0  # seconds, of every wait for a rank that hangs
LONG = 20.0  # of all other waits, which end without it
FAULTY = 1  # the rank that fails
S = 13

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- measured by tests/faults.py: begin -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Phase:
    """Where the rank fails.

    Attributes:
        point: which of the points that a rank passes; "forward 1" is before its second ring step's kernel.
        step: what all ranks do.
        said: what a rank that waits says about where it is, a regular expression.
    """

    point: str
    step: Callable[[df.ContextParallel, Points], torch.Tensor]
    said: str

    @property
    def between_calls(self) -> bool:
        """Whether it is in code of the user's."""
        return self.point.startswith("user")


class Points:
    """The points that a rank passes, at one of which something happens to it."""

    def __init__(self, at: str, happens: Callable[[], None]) -> None:
        self._at, self._happens, self._counts = at, happens, dict[str, int]()

    def pass_by(self, name: str) -> None:
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        if f"{name} {count}" == self._at:
            self._happens()


class Passing(df.kernels.Reference):
    """The reference kernel, each run of which is a point."""

    def __init__(self, points: Points) -> None:
        super().__init__()
        object.__setattr__(self, "points", points)

    def forward(self, *args, **kwargs):
        self.points.pass_by("forward")
        super().forward(*args, **kwargs)

    def backward(self, *args, **kwargs):
        self.points.pass_by("backward")
        super().backward(*args, **kwargs)


def _tokens(cp: df.ContextParallel) -> torch.Tensor:
    whole = torch.randn(1, S, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return cp.shard(whole.to(cp.transport.device)).requires_grad_()


def attend(cp: df.ContextParallel, points: Points) -> torch.Tensor:
    x = _tokens(cp)
    points.pass_by("user")
    out = df.attention(x, x, x, cp=cp, seq_len=S)
    points.pass_by("user")
    out.square().sum().backward()
    return x.grad


def attend_in_checkpoint(cp: df.ContextParallel, points: Points, **context) -> torch.Tensor:
    x = _tokens(cp)

    def block(x: torch.Tensor) -> torch.Tensor:
        return df.attention(x, x, x, cp=cp, seq_len=S)

    checkpoint(block, x, use_reentrant=False, **context).square().sum().backward()
    return x.grad


def unshard(cp: df.ContextParallel, points: Points) -> torch.Tensor:
    x = _tokens(cp)
    points.pass_by("user")
    whole = cp.unshard(x)
    points.pass_by("user")
    whole.square().sum().backward()
    return x.grad


def mean(cp: df.ContextParallel, points: Points) -> torch.Tensor:
    x = _tokens(cp)
    points.pass_by("user")
    cp.mean(x.square().sum(), x.shape[1], reduction="sum").backward()
    return x.grad


def phases(ranks: int) -> dict[str, Phase]:
    """By name; some points depend on how many steps the ring has."""
    keys, gradients = r".*the keys of step \d", r".*the gradients of step \d"
    forward = rf"in call 1, forward of q \(1, \d+, 2, 4\), for{keys}"
    # On CPUs ranks compare every call before it sends anything.
    agreed = r"for all ranks to say .* \(agreement\)"
    backward = rf"in call 2, backward of q \(1, \d+, 2, 4\), for({keys}|{gradients})|{agreed}"
    recomputed = rf"in call (2, for|3, back)ward of q \(1, \d+, 2, 4\), for({keys}|{gradients})|{agreed}"
    # Who has all messages by then goes on to the next pass. Two ranks have them as soon as the kernels begin.
    later, after = f"{forward}|{backward}", f"{backward}|between calls 2 and 3, for the sum over all ranks"
    kept = bind(attend_in_checkpoint, context_fn=df.keep_attention)
    return {
        "before the call": Phase("user 0", attend, agreed),
        "first ring step": Phase("forward 0", attend, forward if ranks > 2 else later),
        "last ring step": Phase(f"forward {ranks - 1}", attend, later),
        "before backward": Phase("user 1", attend, backward),
        "backward, first step": Phase("backward 0", attend, backward),
        "backward, last step": Phase(f"backward {ranks - 1}", attend, after),
        "checkpoint, recomputed forward": Phase(f"forward {ranks}", attend_in_checkpoint, recomputed),
        "checkpoint that keeps attention": Phase("backward 0", kept, backward),
        "before unshard": Phase("user 0", unshard, rf"for the tensors of all ranks \(all-gather\)|{agreed}"),
        "before unshard's backward": Phase("user 1", unshard, rf"for (the )?gradients of an unshard|{agreed}"),
        "before mean": Phase("user 0", mean, r"for the sum over all ranks \(all-reduce\)"),
    }


def raise_an_error() -> None:
    raise ZeroDivisionError("one over nothing")


FAULTS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(1),
    "raises": raise_an_error,
    "hangs": lambda: time.sleep(TIMEOUT + 1.5),
    "is late": lambda: time.sleep(0.5),
}


def cases(ranks: int) -> Iterator[tuple[str, str]]:
    """Phases with their faults. An error raised in a user's code ends the process, as in a script: "exits"."""
    for name, phase in phases(ranks).items():
        yield from ((name, fault) for fault in FAULTS if fault != ("raises" if phase.between_calls else "exits"))


@dataclass(frozen=True)
class Ending:
    """How a rank ended.

    Attributes:
        result: of the step, if it came to its end.
        error: type, words, ranks that failed, and type of the cause.
        seconds: from the fault until here.
        again: type and words of the error of one more call, and how long that took.
        threads: of this package that still run.
    """

    result: torch.Tensor | None
    error: tuple[str, str, tuple[int, ...], str] | None
    seconds: float
    again: tuple[str, str, float]
    threads: tuple[str, ...]


def end_of(phase: str, fault: str) -> Ending:
    """Runs as a rank."""
    store, rank, ranks = dist.group.WORLD.get_group_store(), dist.get_rank(), dist.get_world_size()
    where = phases(ranks)[phase]

    def happens() -> None:
        if rank == FAULTY:
            store.set("fault", str(time.monotonic()))
            FAULTS[fault]()

    points = Points(where.point, happens)
    timeout = TIMEOUT if fault == "hangs" else LONG
    cp = df.ContextParallel(dist.group.WORLD, kernel=Passing(points), timeout=timeout)
    dist.barrier()
    result, error = None, None
    try:
        result = where.step(cp, points)
        # Who got its messages earlier waits here. On GPUs the first of these ends the wait, the second one says so.
        for _ in range(2):
            _use(cp)
    except Exception as raised:
        cause = type(raised.__cause__).__name__
        error = type(raised).__name__, str(raised), getattr(raised, "failed", ()), cause
    seconds = time.monotonic() - float(store.get("fault"))
    again = _again(cp) if error else ("", "", 0.0)
    result = None if result is None else result.cpu()
    running = tuple(thread.name for thread in threading.enumerate() if thread.name.startswith("distflash"))
    return Ending(result, error, seconds, again, running)


def _use(cp: df.ContextParallel) -> None:
    float(cp.mean(torch.zeros((), device=cp.transport.device), 0, reduction="sum"))


def _again(cp: df.ContextParallel) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        _use(cp)
    except Exception as raised:
        return type(raised).__name__, str(raised), time.monotonic() - start
    return "", "", time.monotonic() - start


def endings(ranks: int, phase: str, fault: str, backend: str = "gloo") -> dict[int, Reply]:
    """How each rank ended: `Ending`, or words for a rank that died."""
    group = Ranks(ranks, backend, timeout=60)
    try:
        return group.replies(end_of, phase, fault)
    finally:
        group.stop()


def expected(ranks: int, phase: str) -> list[torch.Tensor]:
    """What the ranks come to without a fault, by rank."""
    where = phases(ranks)[phase]
    whole = where.step(df.ContextParallel(df.transport.Alone()), Points("", raise_an_error))
    times = ranks if where.step is unshard else 1  # its gradient is that of the sum of all ranks' losses
    return [times * whole[:, df.Zigzag().positions(S, ranks, rank)] for rank in range(ranks)]


def survivors(replies: dict[int, Reply]) -> list[Ending]:
    """The endings of the ranks that did nothing wrong."""
    return [reply.value for rank, reply in sorted(replies.items()) if rank != FAULTY]


def exchange_microseconds(guarded: bool, exchanges: int = 300) -> float:
    """Runs as one of two ranks: processor time of the host for an exchange of a few bytes, the least of nine runs."""
    transport: df.transport.Transport = df.transport.Distributed(dist.group.WORLD)
    if guarded:
        transport = df.ContextParallel(transport, timeout=LONG).transport
    peer, sent, arriving = 1 - transport.rank, torch.zeros(16), torch.zeros(16)
    best = math.inf
    for _ in range(9):
        start = time.thread_time()
        for _ in range(exchanges):
            transport.exchange([Message(sent, peer)], [Message(arriving, peer)]).wait()
        best = min(best, time.thread_time() - start)
    return best / exchanges * 1e6


def guard_microseconds(passes: int = 100_000) -> tuple[float, float]:
    """Runs as one of two ranks: what the guard adds to an exchange, and to a forward or backward, without sending."""
    guarded = df.ContextParallel(dist.group.WORLD, timeout=LONG).transport
    q, plain = torch.zeros(1, 1, 1, 1), df.transport.Distributed(dist.group.WORLD)
    assert isinstance(guarded, df.transport.Guarded)
    start = time.thread_time()
    for _ in range(passes):
        guarded.exchange([], []).wait()
    middle = time.thread_time()
    for _ in range(passes):
        plain.exchange([], []).wait()
    end = time.thread_time()
    for _ in range(passes):
        with during(guarded, "forward", q):
            pass
    return (2 * middle - start - end) / passes * 1e6, (time.thread_time() - end) / passes * 1e6


def cost() -> str:
    """What the guard costs on gloo, as a sentence."""
    group = Ranks(2, "gloo", timeout=120)
    try:
        plain, guarded = (group.run(exchange_microseconds, kind)[0] for kind in (False, True))
        exchange, direction = group.run(guard_microseconds)[0]
    finally:
        group.stop()
    return (
        f"An exchange over gloo takes {plain:.0f} us of the host's processor time without the guard and {guarded:.0f} "
        f"us with it. The guard's own part is {exchange:.1f} us an exchange and {direction:.1f} us a forward or "
        f"backward (torch {torch.__version__}, 2 ranks, {os.cpu_count()} cores; {platform.machine()}).\n"
    )


def table() -> str:
    """Every phase and fault: seconds to the last end of a rank that did nothing wrong, and what rank 0 of 3 says."""
    rows = ["| phase | rank 1 | seconds with 2, 3, 4 ranks | rank 0 of 3 |", "|---|---|---|---|"]
    for phase, fault in cases(3):
        ended = {ranks: survivors(endings(ranks, phase, fault)) for ranks in (2, 3, 4)}
        seconds = ", ".join(f"{max(ending.seconds for ending in group):.1f}" for group in ended.values())
        error = ended[3][0].error
        rows.append(f"| {phase} | {fault} | {seconds} | {error[1] if error else 'goes on'} |")
        print(rows[-1], flush=True)
    return "\n".join(rows) + "\n"


def main() -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest.split(END, 1)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{cost()}\n{END}{after}")


if __name__ == "__main__":
    main()
