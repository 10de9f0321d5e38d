"""The sharded KV cache: each rank's part of the keys and values of sequences that grow.

[Note: shapes] B sequences, C keys of a sequence that a rank has memory for, W ranks, G key/value heads, D and V their
head dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import index
from typing import NoReturn

import torch
from torch import Tensor

from distflash.chunks import seen_later
from distflash.context import ALONE, ContextParallel
from distflash.faults import Faults
from distflash.host_records import HostRecords
from distflash.host_to_device import to_device
from distflash.integers import as_int
from distflash.kernels.decoding import Store
from distflash.ledger import Ledger
from distflash.mask_algebra import Mask
from distflash.rows import Rows
from distflash.validation import DTYPES, came


class Cache:
    """This rank's part of a KV cache for a batch of sequences, sharded over the ranks.

    ``df.attention(q, k, v, mask=, cp=, cache=cache)`` appends a chunk of the sequence, sharded as in training, and
    attends to all cached keys. ``df.decode(q, k, v, cache=cache, mask=)`` appends a few tokens that all ranks have.
    Every rank knows which rank stores which key. Chunks may have any length: a rank with more than its share of the
    keys sends some to other ranks, so a sequence of up to ``capacity`` tokens always fits.

    If the cache is full, keys that no later query can see (under `Window` or `Chunked`) are dropped. ``capacity`` then
    limits the keys that are stored at the same time, not the length of the sequence: those that later tokens see and
    the tokens of one call have to fit.

    Args:
        cp: the group that holds the sequences; None: this device holds all of them.
        batch: B, the number of sequences.
        kv_heads: G. d_qk, d_v: head dims of keys and of values; d_v is d_qk by default.
        capacity: the largest number of tokens of a sequence that all ranks together store.
        dtype, device: of keys and values; the device is the group's by default. All memory is allocated here:
            ``B * ceil(capacity / W) * G * (d_qk + d_v)`` elements on each rank, and 4 bytes per token for positions.

    Raises:
        ValueError: an argument has the wrong type.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD)
        >>> cache = df.Cache(cp, batch=1, kv_heads=2, d_qk=64, capacity=64, dtype=torch.float32)
        >>> q, k, v = (torch.randn(1, 10, heads, 64) for heads in (8, 2, 2))  # this rank's tokens of a chunk of 20
        >>> out = df.attention(q, k, v, mask=df.Causal(), cp=cp, cache=cache)
        >>> cache.length, cache.kept()
        (20, (10,))
        >>> cache.truncate(12)
        >>> cache
        Cache(rank 0 of 2, batch=1, kv_heads=2, d_qk=64, d_v=64, capacity=64, dtype=torch.float32, lengths=(12,))
    """

    def __init__(
        self,
        cp: ContextParallel | None,
        *,
        batch: int,
        kv_heads: int,
        d_qk: int,
        capacity: int,
        d_v: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        cp = ALONE if cp is None else cp
        if not isinstance(cp, ContextParallel):
            raise ValueError(f"cp: expected a ContextParallel, got {came(cp)}; make one of the process group first")
        if cp.schedule.reproducible:
            raise ValueError(
                f"cp: a cache keeps keys where there is room, and its sums go by ranks; they are not those of "
                f"{cp.schedule!r}, which goes by whole chunks. Make the cache with another ContextParallel of the group"
            )
        d_v = d_qk if d_v is None else d_v
        sizes = {"batch": batch, "kv_heads": kv_heads, "d_qk": d_qk, "d_v": d_v, "capacity": capacity}
        for name, size in sizes.items():
            if (as_int(size) or 0) < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {came(size)}")
        batch, kv_heads, d_qk, d_v, capacity = map(index, sizes.values())
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected float16, bfloat16, float32 or float64, got {came(dtype)}")
        device = torch.device(cp.transport.device if device is None else device)
        W, room = cp.world_size, -(-capacity // cp.world_size)
        self.cp, self.capacity = cp, capacity
        self.rows = range(batch)
        self.records = HostRecords([cp.calls.nothing] * batch, [0] * batch)
        # Also if made under `torch.inference_mode`, since the cache may be used outside of it.
        with torch.inference_mode(False):
            self.store = Store(
                k=torch.zeros(batch, room, kv_heads, d_qk, dtype=dtype, device=device),
                v=torch.zeros(batch, room, kv_heads, d_v, dtype=dtype, device=device),
                positions=torch.zeros(batch, room, dtype=torch.int32, device=device),
                counts=torch.zeros(batch, W, dtype=torch.int32, device=device),
                lengths=torch.zeros(batch, dtype=torch.int32, device=device),
                fault=torch.zeros(1, dtype=torch.int32, device=device),
            )
        self.faults = Faults(self.store.fault)

    def __getitem__(self, sequence: int) -> Cache:
        """One sequence, as a cache of batch 1 that shares this cache's memory.

        Raises:
            IndexError: there is no such sequence.
        """
        number = as_int(sequence)
        if number is None or not -self.batch <= number < self.batch:
            raise IndexError(f"sequence: expected an int from {-self.batch} to {self.batch - 1}, got {came(sequence)}")
        row = self.rows[number]
        at, store = row - self.rows.start, self.store
        some = slice(at, at + 1)
        one = object.__new__(Cache)
        one.cp, one.capacity, one.records, one.faults = self.cp, self.capacity, self.records, self.faults
        one.rows = range(row, row + 1)
        one.store = Store(
            k=store.k[some],
            v=store.v[some],
            positions=store.positions[some],
            counts=store.counts[some],
            lengths=store.lengths[some],
            fault=store.fault,
        )
        return one

    def __repr__(self) -> str:
        _, _, G, D = self.store.k.shape
        return (
            f"Cache(rank {self.cp.rank} of {self.cp.world_size}, batch={self.batch}, kv_heads={G}, d_qk={D}, "
            f"d_v={self.store.v.shape[3]}, capacity={self.capacity}, dtype={self.store.k.dtype}, "
            f"lengths={self.lengths})"
        )

    @property
    def batch(self) -> int:
        """How many sequences."""
        return len(self.rows)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length of each sequence in tokens. Synchronises with the device after steps were captured in a graph."""
        self.update()
        return tuple(self.records.lengths[row] for row in self.rows)

    @property
    def length(self) -> int:
        """The length of the longest sequence in tokens."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory on this rank."""
        store = self.store
        return sum(x.nbytes for x in (store.k, store.v, store.positions, store.counts, store.lengths))

    def kept(self, rank: int | None = None) -> tuple[int, ...]:
        """How many keys of each sequence a rank stores, by default this rank."""
        rank = self.cp.rank if rank is None else rank
        return tuple(ledger.counts[rank] for ledger in self.ledgers())

    def truncate(self, length: int | Sequence[int]) -> None:
        """Drop all tokens from ``length`` on, such as rejected drafts.

        Communicates nothing: every rank has to make the same call.

        Args:
            length: at most the cache's length. One for each sequence, or one for all; sequences that are shorter than
                it stay as they are.

        Raises:
            ValueError: it is not a length, or longer than the cache's.
        """
        lengths, one = self.lengths, as_int(length)
        wanted = [one] * self.batch if one is not None else _ints(length)
        if len(wanted) != self.batch or min(wanted) < 0:
            raise ValueError(
                f"length: expected a length of at least 0, or one for each of {self.batch} sequences, got "
                f"{came(length)}"
            )
        shorter = wanted
        if one is not None and one <= max(lengths):
            shorter = [min(one, own) for own in lengths]
        if any(n > own for n, own in zip(shorter, lengths, strict=True)):
            raise ValueError(f"length: expected at most the cache's, {lengths}, got {came(length)}")
        self.shrink([ledger.truncated(n) for ledger, n in zip(self.ledgers(), shorter, strict=True)])

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Replace sequence n by sequence ``indices[n]``, as beam search does.

        Communicates nothing: every rank has to make the same call.

        Raises:
            ValueError: indices are not one for each sequence.
        """
        came_from = _ints(indices)
        if len(came_from) != self.batch or not all(0 <= n < self.batch for n in came_from):
            raise ValueError(
                f"indices: expected {self.batch} integers from 0 to {self.batch - 1}, one for each sequence, got "
                f"{came(indices)}"
            )
        ledgers = self.ledgers()
        if came_from == list(range(self.batch)):
            return
        self._copy_rows(torch.tensor(came_from, device=self.store.k.device))
        self.record([ledgers[n] for n in came_from])

    def make_room(self, mask: Mask) -> None:
        """Drop the keys that no later token sees under ``mask``.

        Calls do this when the cache is full. Only between replays of a captured step it has to be called explicitly,
        since a graph drops nothing. Every rank has to make the same call.
        """
        ledgers = self.ledgers()
        self.shrink([self.fewer(ledger, mask_of(mask, n)) for n, ledger in enumerate(ledgers)])

    def fewer(self, ledger: Ledger, mask: Mask) -> Ledger:
        """The ledger without keys that no later token sees."""
        some = seen_later(mask, ledger.total)
        return ledger if some == (range(ledger.total),) else ledger.keeping(some)

    def with_room(self, ledger: Ledger, mask: Mask, more: Callable[[Ledger], Ledger], tokens: int) -> Ledger:
        """The ledger of a sequence. If ``more`` tokens do not fit, without keys that no later token sees.

        Raises:
            ValueError: they do not fit even then.
        """
        if self.has_room_for(more(ledger)):
            return ledger
        ledger = self.fewer(ledger, mask)
        if self.has_room_for(more(ledger)):
            return ledger
        raise ValueError(
            f"cache: {tokens} more tokens do not fit beside the {sum(ledger.counts)} that are kept of a sequence of "
            f"{ledger.total}; expected at most capacity={self.capacity} together. Make a cache of a larger capacity, "
            "pass fewer tokens at once, or shorten the sequence with cache.truncate(n)"
        )

    def has_dropped(self) -> bool:
        """Whether keys of any sequence have been dropped. Does not need up-to-date ledgers."""
        ledgers = [self.records.ledgers[row] for row in self.rows]
        return any(sum(ledger.counts) < ledger.total for ledger in ledgers)

    def is_full_with(self, tokens: int) -> bool:
        """Whether ``tokens`` more for each sequence only fit if keys are dropped. Does not need up-to-date ledgers."""
        return max(self._kept_by_all()) + tokens > self.capacity

    def _kept_by_all(self) -> list[int]:
        """How many keys of each sequence all ranks together store."""
        ledgers = [self.records.ledgers[row] for row in self.rows]
        return [sum(of.counts) + length - of.total for of, length in zip(ledgers, self.lengths, strict=True)]

    def has_room_for(self, ledger: Ledger) -> bool:
        """Whether the keys of a sequence fit into the ranks' memory."""
        return sum(ledger.counts) <= self.capacity and max(ledger.counts) <= self.store.room

    def ledgers(self) -> list[Ledger]:
        """The up-to-date ledger of each sequence. Synchronises with steps made since the last call."""
        self.raise_fault()
        lengths, records = self.lengths, self.records
        for row, length in zip(self.rows, lengths, strict=True):
            ledger = records.ledgers[row]
            # Steps that the host has counted may not have happened, see `raise_fault`.
            longer = length >= ledger.total
            records.ledgers[row] = ledger.with_step(length - ledger.total) if longer else ledger.truncated(length)
        return [records.ledgers[row] for row in self.rows]

    def shrink(self, ledgers: Sequence[Ledger]) -> None:
        """Keep only the keys of these ledgers, which are a subset of the stored ones."""
        rank = self.cp.rank
        for n, (row, new) in enumerate(zip(self.rows, ledgers, strict=True)):
            old = self.records.ledgers[row]
            if new is not old and not _begins(new.held[rank], old.held[rank]):
                self._compact(n, old.held[rank], new.held[rank])
        self.record(ledgers)

    def record(self, ledgers: Sequence[Ledger]) -> None:
        """Record ledgers on the host and on the device. Their keys are stored already."""
        for row, ledger in zip(self.rows, ledgers, strict=True):
            self.records.ledgers[row], self.records.lengths[row] = ledger, ledger.total
        counts = torch.tensor([ledger.counts for ledger in ledgers], dtype=torch.int32)
        totals = torch.tensor([ledger.total for ledger in ledgers], dtype=torch.int32)
        self.store.counts.copy_(to_device(counts, self.store.k.device))
        self.store.lengths.copy_(to_device(totals, self.store.k.device))

    def grow(self, tokens: int, capturing: bool) -> None:
        """Record that a step has appended ``tokens`` to each sequence, or that a captured step will in each replay."""
        if capturing:
            self.records.stale = self.faults.captured = True
            return
        with self._counting_again():
            self.faults.note()
        for row in self.rows:
            self.records.lengths[row] += tokens

    def raise_fault(self, late: bool = False) -> None:
        """Raise the faults that the device has found in steps. late: only those that all ranks know before a step."""
        with self._counting_again():
            self.faults.raise_late() if late else self.faults.raise_now()

    @contextmanager
    def _counting_again(self) -> Iterator[None]:
        """After a fault: steps that the host has counted may not have happened."""
        try:
            yield
        except ValueError:
            self.records.stale = True
            raise

    def update(self) -> None:
        """Read from the device what replays of a captured step have appended."""
        if self.records.stale:
            lengths = self.store.lengths.tolist()
            for row, length in zip(self.rows, lengths, strict=True):
                self.records.lengths[row] = length

    def problem(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cp: ContextParallel) -> str | None:
        """Check that valid tensors q, k, v match this cache. Returns the error message or None."""
        if cp is not self.cp:
            return (
                f"cache: was made with {self.cp!r}, the call has another one, {cp!r}; pass the same ContextParallel, "
                "the object itself"
            )
        for name, x, own in (("k", k, self.store.k), ("v", v, self.store.v)):
            if x.shape[0] != self.batch or x.shape[2:] != own.shape[2:]:
                return (
                    f"{name}: is for {x.shape[0]} sequences with {x.shape[2]} heads of {x.shape[3]}, the cache for "
                    f"{self.batch} with {own.shape[2]} heads of {own.shape[3]}; make the cache with batch=, kv_heads=, "
                    "d_qk= and d_v= of the model, or take one sequence of it with cache[n]"
                )
            if x.dtype != own.dtype or x.device != own.device:
                return (
                    f"{name}: is {x.dtype} on {x.device}, the cache {own.dtype} on {own.device}; expected the same. "
                    "Make the cache with dtype= and device= of the model's keys, or cast q, k and v"
                )
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
            return (
                "q, k, v, sinks: require a gradient, which does not go through a cache; call the model under "
                "torch.no_grad() or torch.inference_mode()"
            )
        return None

    def refuse(self, problem: str) -> NoReturn:
        """Raise on all ranks, which are in the same call."""
        self.cp.refuse(problem, in_attention=True)

    def _compact(self, n: int, had: Tensor, wanted: Tensor) -> None:
        """Move the keys of a sequence at ``wanted`` positions to the front, in place."""
        at = to_device(torch.searchsorted(had, wanted), self.store.k.device)
        for x in (self.store.k, self.store.v, self.store.positions):
            x[n, : len(wanted)] = x[n].index_select(0, at)

    def _copy_rows(self, came_from: Tensor) -> None:
        """Reorder the sequences in place, some tokens at a time: a copy of the whole cache might not fit."""
        most = max(self.kept())
        for x in (self.store.k, self.store.v, self.store.positions):
            for start in range(0, most, _AT_ONCE):
                part = x[:, start : min(most, start + _AT_ONCE)]
                part.copy_(part.index_select(0, came_from))


def _ints(numbers: object) -> list[int]:
    """Integers of any kind as Python ints; an empty list if anything is not an integer."""
    if isinstance(numbers, str | bytes) or not isinstance(numbers, Iterable) or getattr(numbers, "ndim", 1) != 1:
        return []
    ints = [as_int(n) for n in numbers]
    return [n for n in ints if n is not None] if None not in ints else []


# Tokens that are copied together.
_AT_ONCE = 4096


def mask_of(mask: Mask, sequence: int) -> Mask:
    """The mask of one sequence of a batch."""
    return mask.masks[sequence] if isinstance(mask, Rows) else mask


def _begins(part: Tensor, whole: Tensor) -> bool:
    """Whether ``part`` is the beginning of ``whole``."""
    return len(part) <= len(whole) and (not len(part) or torch.equal(part, whole[: len(part)]))
