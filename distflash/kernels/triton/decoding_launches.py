"""Decoding in Triton, the host's side: how the keys are split, and the launches. See `distflash.kernels.decoding`.

One launch is a step of a single rank; with more ranks, one is `attend` and one is `merge`. Nothing here depends on how
many keys there are.

[Note: shapes] as in `distflash.kernels.decoding`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from distflash.kernels.base import Problem, Scores
from distflash.kernels.decoding import WORDS, Decoding, Store, Table
from distflash.kernels.launch import Launch, aligned, on
from distflash.kernels.triton import common, decoding_ends
from distflash.kernels.triton import decoding as of_decoding
from distflash.kernels.triton.decoding import attend_kernel, merge_kernel
from distflash.kernels.triton.kernel import Triton, family
from distflash.kernels.triton.keys import settle

settle(common, decoding_ends, of_decoding)

# The largest tile of rows, by the size of elements: more new tokens than fit into it are worked on by programs of their
# own. Products of float32 take their operands from registers.
_MOST_ROWS = {2: 64, 4: 16}
# Numbers of the partial states that a program merges at a time, some registers of each thread.
_MERGED = 16384
# Positions that a program looks at together for either ends of intervals.
_SEARCHED = 2048
# Bytes of keys and values that others read while a unit's first program sees to the new keys.
_AHEAD = 2**17
# Splits are chosen to fill the last round of programs by this much, if few rounds are enough.
_FULL, _ROUNDS = 0.93, 4


@dataclass(frozen=True)
class Knobs:
    """``block_n`` keys a step for ``num_warps`` warps, ``num_stages`` in flight; ``programs`` share a processor."""

    block_n: int
    num_warps: int
    num_stages: int
    programs: int


def choose(family: str, itemsize: int, dims: int) -> Knobs:
    """The shipped knobs for a device family, elements of this size, and keys and values of ``dims`` numbers together.

    On Hopper a processor has 128 KB in flight. Where a tile is half of that, a program has the processor for itself:
    there are fewer partial states to merge.
    """
    if family == "interpreter":
        return Knobs(block_n=32, num_warps=4, num_stages=1, programs=1)
    if family in ("sm_90", "sm_100"):
        # Products of float32 are made of many more instructions, and need registers.
        keys = _tile((2**16 if itemsize == 2 else 2**15) // (dims * itemsize), 128)
        return Knobs(keys, num_warps=4, num_stages=3, programs=min(3, max(1, 2**16 // (keys * dims * itemsize))))
    return Knobs(_tile(2**14 // (dims * itemsize), 64), num_warps=4, num_stages=2, programs=2)


def _tile(keys: int, most: int) -> int:
    """The power of two below, from 16 on."""
    return min(most, 1 << max(keys.bit_length() - 1, 4))


@dataclass(frozen=True)
class Device:
    """What the launches need to know of a device: it has so many ``processors``."""

    knobs: Knobs
    processors: int


def splits(units: int, room: int, knobs: Knobs, processors: int) -> int:
    """How many programs share the keys of a unit.

    The fewest rounds of programs that keep nearly all processors busy to the end; otherwise those that do best.
    """
    at_a_time, most = processors * knobs.programs, _blocks(room, knobs.block_n)
    best, found = 0.0, 1
    for rounds in range(1, _ROUNDS + 1):
        n = max(1, min(most, at_a_time * rounds // units))
        share = n * units / (at_a_time * _blocks(n * units, at_a_time))
        if share > best:
            best, found = share, n
        if best >= _FULL or n == most:
            break
    return found


@dataclass(frozen=True)
class Sizes:
    """What a launch of `attend` depends on beside its tensors' data: shapes ``[B, n, H, D]``, ``[B, C, G, V]``."""

    batch: int
    new: int
    heads: int
    d_qk: int
    room: int
    kv_heads: int
    d_v: int
    parts: int
    ranks: int
    itemsize: int


@dataclass(frozen=True)
class Layout:
    """How a launch is laid out: ``programs``, numbers of `scratch` in float32, and the kernel's constants."""

    programs: int
    scratch: int
    constants: dict[str, Any]


@lru_cache(64)
def layout(sizes: Sizes, device: Device) -> Layout:
    knobs = device.knobs
    s, group, halves = sizes, sizes.heads // sizes.kv_heads, 2 if sizes.itemsize == 2 else 1
    rows = s.new * group
    block_m = max(16, min(_MOST_ROWS[s.itemsize], _power(halves * rows))) // halves
    blocks = _blocks(rows, block_m)
    units = s.batch * s.kv_heads * blocks
    count = splits(units, s.room, knobs, device.processors) if units else 1
    together = min(_power(count), _MERGED // _padded(s.d_v))
    tile = knobs.block_n * (s.d_qk + s.d_v) * s.itemsize
    # The tokens whose rows a tile can have: its first row may be in the middle of them.
    tokens = min(s.new, (block_m - 1) // group + (1 if block_m % group == 0 else 2))
    constants = dict(
        room=s.room,
        batches=s.batch,
        G=s.kv_heads,
        GROUP=group,
        D=s.d_qk,
        V=s.d_v,
        DP=_padded(s.d_qk),
        VP=_padded(s.d_v),
        NEW=s.new,
        KEYS=_padded(s.new),
        W=s.ranks,
        WP=_power(s.ranks),
        **_search(s, _power(tokens)),
        BLOCK_M=block_m,
        HALVES=halves,
        BLOCK_N=knobs.block_n,
        BLOCKS=blocks,
        SPLITS=count,
        AHEAD=_blocks(_AHEAD, tile),
        SP=together,
        MERGE_M=max(1, min(block_m, _power(rows), _MERGED // (together * _padded(s.d_v)))),
        num_warps=knobs.num_warps,
        num_stages=knobs.num_stages,
        enable_fp_fusion=True,  # triton 3.10 turns it off where it is not asked for
    )
    between = units * (count * block_m * (s.d_v + 2) + 1) if count > 1 else 0
    return Layout(units * count, between, constants)


def _search(sizes: Sizes, tokens: int) -> dict[str, int]:
    """How the ends of the mask at a tile's ``tokens`` are looked for among the positions that a rank keeps."""
    ends = _power(sizes.parts) * tokens
    levels = 2 if _lanes(sizes.room, 2) * ends <= _SEARCHED else 3
    return dict(PARTS=sizes.parts, NP=tokens, E=ends, LANES=_lanes(sizes.room, levels), LEVELS=levels)


@dataclass(frozen=True)
class TritonDecoding(Decoding):
    """A step of decoding in Triton, on the GPUs and for the dtypes and head dims of `Triton`.

    One object's steps on a device run one after another: they share counters, made once and left at zero.

    Args:
        knobs: in place of the shipped ones, for tuning.
        interpret: as in `Triton`.
    """

    knobs: Knobs | None = None
    interpret: bool = False
    _counters: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Every reason why this kernel cannot take the problem, as `Kernel.not_supported_reasons`."""
        return Triton(interpret=self.interpret).not_supported_reasons(problem)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, store: Store, table: Table, scores: Scores, rank: int) -> Tensor:
        with on(q.device):
            launch, message = attend_launch(self._device(q, v), q, k, v, store, table, scores, rank)
            self._run(launch, q.device)
        return message

    def alone(
        self, q: Tensor, k: Tensor, v: Tensor, store: Store, table: Table, scores: Scores, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with on(q.device):
            launch, out, lse = alone_launch(self._device(q, v), q, k, v, store, table, scores, sinks)
            self._run(launch, q.device)
        return out, lse

    def merge(self, messages: Tensor, q: Tensor, store: Store, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        words = messages.shape[2]
        rows = q.shape[1] * q.shape[2]
        out, lse = _results(q, (words - WORDS) // rows - 2)
        with on(q.device):
            merge_launch(messages.contiguous(), store, sinks, out, lse).run()
        return out, lse

    def _run(self, launch: Launch, device: torch.device) -> None:
        launch.arguments["counters"] = self._zeros(device, launch.programs)
        launch.run()

    def _device(self, q: Tensor, v: Tensor) -> Device:
        name, processors = _machine(q.device)
        dims = _padded(q.shape[3]) + _padded(v.shape[3])
        return Device(self.knobs or choose(name, q.element_size(), dims), processors)

    def _zeros(self, device: torch.device, programs: int) -> Tensor:
        """Counters for all units of so many programs, which are as many at most."""
        key = device, _padded(programs + 1)
        found = self._counters.get(key)
        if found is None:
            found = torch.zeros(key[1], dtype=torch.int32, device=device)
            # Memory of a graph that is being captured is zero only within it.
            if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
                self._counters[key] = found
        return found


def attend_launch(
    device: Device, q: Tensor, k: Tensor, v: Tensor, store: Store, table: Table, scores: Scores, rank: int
) -> tuple[Launch, Tensor]:
    """The launch of `attend`, which still lacks its counters, and the message."""
    B, n, H, _ = q.shape
    message = q.new_empty(B, n * H * (v.shape[3] + 2) + WORDS, dtype=torch.float32)
    written: dict[str, Any] = dict(message=message, words=message.view(torch.int32), out=message, lse=message)
    written |= dict(sinks=message, SINKS=False, FINAL=False)
    return _launch(device, q, k, v, store, table, scores, rank, written), message


def alone_launch(
    device: Device, q: Tensor, k: Tensor, v: Tensor, store: Store, table: Table, scores: Scores, sinks: Tensor | None
) -> tuple[Launch, Tensor, Tensor]:
    """The launch of `alone`, which still lacks its counters, and its results."""
    out, lse = _results(q, v.shape[3])
    written = dict(message=lse, words=lse, out=out, lse=lse, FINAL=True) | _sinks(sinks, lse)
    return _launch(device, q, k, v, store, table, scores, 0, written), out, lse


def _launch(
    device: Device, q: Tensor, k: Tensor, v: Tensor, store: Store, table: Table, scores: Scores, rank: int,
    written: dict[str, Any],
) -> Launch:  # fmt: skip
    """``written``: what the launch writes, and how it ends."""
    B, n, H, D = q.shape
    _, C, G, V = store.v.shape
    R, _, P, N = table.ends.shape
    found = layout(Sizes(B, n, H, D, C, G, V, P, store.counts.shape[1], q.element_size()), device)
    assert all(x.is_contiguous() for x in (store.k, store.v, store.positions, store.counts)), "a store has gaps"
    slopes = scores.alibi_slopes
    return Launch(
        kernel=attend_kernel,
        programs=found.programs,
        arguments=dict(
            q=_given(q),
            k=_given(k),
            v=_given(v),
            k_kept=(store.k, D, G * D),
            v_kept=(store.v, V, G * V),
            positions=store.positions,
            counts=store.counts,
            lengths=store.lengths,
            fault=store.fault,
            ends=table.ends,
            ends_step=table.ends.stride(0) if R > 1 else 0,
            start=table.start,
            horizon=N,
            slopes=written["lse"] if slopes is None else slopes,
            ALIBI=slopes is not None,
            scratch=q.new_empty(found.scratch, dtype=torch.float32),
            scale=scores.scale,
            softcap=scores.softcap,
            SOFTCAP=scores.softcap > 0,
            rank=rank,
            **found.constants,
            **written,
        ),
    )


def merge_launch(messages: Tensor, store: Store, sinks: Tensor | None, out: Tensor, lse: Tensor) -> Launch:
    """The launch of `merge`. ``messages`` are contiguous."""
    B, n, H, V = out.shape
    W = len(messages)
    block_m = min(4, _power(n * H))
    return Launch(
        kernel=merge_kernel,
        programs=B * _blocks(n * H, block_m),
        arguments=dict(
            messages=messages,
            words=messages.view(torch.int32),
            counts=store.counts,
            lengths=store.lengths,
            fault=store.fault,
            **_sinks(sinks, lse),
            out=out,
            lse=lse,
            batches=B,
            HEADS=H,
            NEW=n,
            V=V,
            VP=_padded(V),
            W=W,
            WP=_power(W),
            BLOCK_M=block_m,
            num_warps=4,
            enable_fp_fusion=True,
        ),
    )


def _results(q: Tensor, d_v: int) -> tuple[Tensor, Tensor]:
    B, n, H, _ = q.shape
    return q.new_empty(B, n, H, d_v), q.new_empty(B, n, H, dtype=torch.float32)


def _sinks(sinks: Tensor | None, nothing: Tensor) -> dict[str, Any]:
    return dict(sinks=nothing if sinks is None else sinks.contiguous().resolve_neg(), SINKS=sinks is not None)


@cache
def _machine(device: torch.device) -> tuple[str, int]:
    """The device's family, and how many processors it has."""
    name = family(device)
    return name, 3 if name == "interpreter" else torch.cuda.get_device_properties(device).multi_processor_count


def _given(x: Tensor) -> tuple[Any, ...]:
    """New tokens ``[B, n, heads, dim]`` at any strides; that of a dimension of size 1 is not one to compile for."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        _, n, heads, dim = x.shape
        return x, n * heads * dim, heads * dim, dim
    x = aligned(x, packed=False)
    strides = (s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))
    return (x, *strides)


def _padded(dim: int) -> int:
    """As many as a tile's side needs, 16 at least."""
    return max(16, _power(dim))


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def _lanes(room: int, levels: int) -> int:
    """The least power of two whose ``levels``-th power is ``room``, or more."""
    lanes = 16
    while lanes**levels < room:
        lanes *= 2
    return lanes
