"""Kernels of a device, and the gaps between them, from a trace of torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

FORWARD, BACKWARD, NCCL, COPY, OTHER = "attention forward", "attention backward", "NCCL", "copy", "other"
KINDS = (FORWARD, BACKWARD, NCCL, COPY, OTHER)
ATTENTION = (FORWARD, BACKWARD)
# First match wins. PyTorch's own kernels are never attention here, whatever their names hold.
_RULES = (
    (NCCL, r"nccl"),
    (COPY, r"memcpy|memset|copy_kernel|CatArray"),
    (OTHER, r"at::native|statistics|preprocess|postprocess|c10d::"),
    (BACKWARD, r"backward|bwd|dkdv|dkv|dq"),
    (FORWARD, r"forward|fwd|attend|attention"),
)
# Busy waiting that a benchmark puts in front, so that the host gets ahead, and what comes before it.
_WAITING = r"spin_kernel"
_BEFORE_ATTENTION = 200.0
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Span:
    """One kernel or copy: microseconds since a common beginning."""

    rank: int
    stream: int
    name: str
    kind: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class Gap:
    """A time in which the compute stream did nothing, between two of its kernels; what ran elsewhere meanwhile."""

    rank: int
    start: float
    duration: float
    after: str
    before: str
    meanwhile: dict[str, float]


# Of autograd, around what they call.
_AROUND = ("autograd::", "_Eager")


def kind_of(name: str) -> str:
    for kind, pattern in _RULES:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return OTHER


def spans_of(trace: dict[str, Any], rank: int) -> list[Span]:
    """The kernels and copies of an exported trace, in the order in which they began, counted from its own beginning.

    A trace without any (of a CPU) gives its outermost operators instead, a thread for a stream.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    device = [e for e in events if e.get("cat") in _DEVICE and not re.search(_WAITING, e["name"])]
    named = [e for e in events if e.get("cat") == "cpu_op" or e["name"].startswith("distflash::")]
    chosen = device or _outermost([e for e in named if not e["name"].startswith(_AROUND)])
    spans = [
        Span(
            rank=rank,
            stream=int(e["args"]["stream"] if device else e["tid"]),
            name=short(e["name"]),
            kind=kind_of(e["name"]),
            start=float(e["ts"]),
            duration=e["dur"],
        )
        for e in chosen
    ]
    return sorted(spans, key=lambda span: span.start)


def _outermost(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    kept, end = [], {}
    for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if e["ts"] >= end.get(e["tid"], 0.0):
            kept.append(e)
            end[e["tid"]] = e["ts"] + e["dur"]
    return kept


def short(name: str) -> str:
    """A kernel's name without return type, namespaces and template arguments."""
    plain = re.sub(r"<.*", "", name.removeprefix("void "))
    return plain.split("::")[-1].split("(")[0].strip()[:60] or name[:60]


def together(parts: Sequence[tuple[int, list[Span]]]) -> list[Span]:
    """Several traces' spans on one clock that starts with the first of them.

    Args:
        parts: for each trace, when it began, in nanoseconds, and its spans. What lies more than 200 us before its first
            attention kernel belongs to the preparations, and is left out.
    """
    earliest = min(begin for begin, _ in parts)
    spans = []
    for begin, own in parts:
        first = min((s.start for s in own if s.kind in ATTENTION), default=0.0)
        kept = (s for s in own if s.start >= first - _BEFORE_ATTENTION)
        spans += [replace(s, start=s.start + (begin - earliest) / 1e3) for s in kept]
    zero = min((s.start for s in spans), default=0.0)
    return [replace(s, start=s.start - zero) for s in spans]


def compute_stream(spans: Sequence[Span]) -> int | None:
    """The stream with most of the attention; None if there is none."""
    busy: dict[int, float] = {}
    for span in spans:
        if span.kind in ATTENTION:
            busy[span.stream] = busy.get(span.stream, 0.0) + span.duration
    return max(busy, key=lambda stream: busy[stream]) if busy else None


def gaps_of(spans: Sequence[Span], least: float) -> list[Gap]:
    """Gaps longer than ``least`` microseconds on one rank's compute stream, between its attention kernels."""
    stream = compute_stream(spans)
    computing = sorted((s for s in spans if s.stream == stream), key=lambda s: s.start)
    places = [n for n, span in enumerate(computing) if span.kind in ATTENTION]
    if not places:
        return []
    elsewhere = [s for s in spans if s.stream != stream]
    gaps, last = [], computing[places[0]]
    for span in computing[places[0] + 1 : places[-1] + 1]:
        if span.start - last.end > least:
            during = _meanwhile(elsewhere, last.end, span.start)
            gaps.append(Gap(span.rank, last.end, span.start - last.end, last.name, span.name, during))
        last = max(last, span, key=lambda s: s.end)
    return gaps


def _meanwhile(spans: Sequence[Span], start: float, end: float) -> dict[str, float]:
    """Microseconds of each kind of span within ``[start, end)``."""
    found: dict[str, float] = {}
    for span in spans:
        overlap = min(span.end, end) - max(span.start, start)
        if overlap > 0:
            found[span.kind] = found.get(span.kind, 0.0) + overlap
    return found


def summary(spans: Sequence[Span]) -> dict[str, float]:
    """One rank: microseconds of each kind, of all from the first attention kernel's start to the last one's end, and of
    its compute stream's idleness within.
    """
    attention = [s for s in spans if s.kind in ATTENTION]
    if not attention:
        return {}
    start, end = min(s.start for s in attention), max(s.end for s in attention)
    within = {kind: sum(s.duration for s in spans if s.kind == kind and start <= s.start < end) for kind in KINDS}
    return {**within, "all": end - start, "idle": sum(gap.duration for gap in gaps_of(spans, 0.0))}
