"""The keys and values of sequences that grow, each rank's part of them: what `attention` and `decode` attend to.

[Note: shapes] B sequences, C keys of a sequence that a rank has room for, W ranks, G key/value heads, D and V their
head dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import index
from typing import NoReturn

import torch
from torch import Tensor

from distflash.books import Books
from distflash.chunks import seen_later
from distflash.context import ALONE, ContextParallel
from distflash.faults import Faults
from distflash.integers import as_int
from distflash.kernels.decoding import Store
from distflash.ledger import Ledger
from distflash.masks import Mask
from distflash.rows import Rows
from distflash.upload import upload
from distflash.validation import DTYPES, came


class Cache:
    """This rank's part of the keys and values of sequences that grow together.

    ``df.attention(q, k, v, mask=, cp=, cache=cache)`` appends a chunk, sharded as in training, and attends to all that
    is kept; ``df.decode(q, k, v, cache=cache, mask=)`` does so for a few tokens that all ranks have. Every rank knows
    where every key is. Chunks may have any length: what a rank brings beyond its share is kept by another one, so that
    the sequence fits wherever ``capacity`` tokens do.

    Under a mask that forgets (`Window`, `Chunked`), keys that no later query can see make room when room is needed.
    ``capacity`` then bounds what is kept at a time, not the sequence. It has to hold what later tokens see and the
    tokens of one call.

    Args:
        cp: the group that holds the sequences; None: this device holds all of them.
        batch: B, how many sequences.
        kv_heads: G. d_qk, d_v: head dims of keys and of values; d_v is d_qk by default.
        capacity: how many tokens of a sequence all ranks together have room for.
        dtype, device: of keys and values; the device is the group's by default. Memory is allocated here, once:
            ``B * ceil(capacity / W) * G * (d_qk + d_v)`` elements, and 4 bytes a token for positions.

    Raises:
        ValueError: an argument is of another kind.

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
        self.books = Books([cp.calls.nothing] * batch, [0] * batch)
        # Under `torch.inference_mode` too: a cache may be used outside of it.
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
        """One sequence, as a cache of batch 1 that shares this one's memory.

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
        one.cp, one.capacity, one.books, one.faults = self.cp, self.capacity, self.books, self.faults
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
        """How many tokens each sequence has had. Waits for the device once steps have been captured in a graph."""
        self.update()
        return tuple(self.books.lengths[row] for row in self.rows)

    @property
    def length(self) -> int:
        """How many tokens the longest sequence has had."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Of device memory on this rank."""
        store = self.store
        return sum(x.nbytes for x in (store.k, store.v, store.positions, store.counts, store.lengths))

    def kept(self, rank: int | None = None) -> tuple[int, ...]:
        """How many keys of each sequence a rank keeps, by default this one."""
        rank = self.cp.rank if rank is None else rank
        return tuple(ledger.counts[rank] for ledger in self.ledgers())

    def truncate(self, length: int | Sequence[int]) -> None:
        """Forget all tokens from ``length`` on: drafts that were rejected, a turn of a conversation.

        Asks no other rank: every rank has to call it alike.

        Args:
            length: at most the cache's; one for all sequences, those that are shorter stay as they are, or one for
                each.

        Raises:
            ValueError: it is no length, or longer than the cache's.
        """
        mine, one = self.lengths, as_int(length)
        wanted = [one] * self.batch if one is not None else _ints(length)
        if len(wanted) != self.batch or min(wanted) < 0:
            raise ValueError(
                f"length: expected a length of at least 0, or one for each of {self.batch} sequences, got "
                f"{came(length)}"
            )
        shorter = wanted
        if one is not None and one <= max(mine):
            shorter = [min(one, own) for own in mine]
        if any(n > own for n, own in zip(shorter, mine, strict=True)):
            raise ValueError(f"length: expected at most the cache's, {mine}, got {came(length)}")
        self.shrink([ledger.truncated(n) for ledger, n in zip(self.ledgers(), shorter, strict=True)])

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Sequence n becomes what sequence ``indices[n]`` was: the beams that go on.

        Asks no other rank: every rank has to call it alike.

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
        """Drop the keys that no later token sees under ``mask``. Calls do so where they need room.

        Only between the replays of a captured step it has to be called: a graph drops nothing. Every rank has to call
        it alike.
        """
        ledgers = self.ledgers()
        self.shrink([self.fewer(ledger, mask_of(mask, n)) for n, ledger in enumerate(ledgers)])

    def fewer(self, ledger: Ledger, mask: Mask) -> Ledger:
        """The ledger without keys that no later token sees."""
        some = seen_later(mask, ledger.total)
        return ledger if some == (range(ledger.total),) else ledger.keeping(some)

    def with_room(self, ledger: Ledger, mask: Mask, more: Callable[[Ledger], Ledger], tokens: int) -> Ledger:
        """The ledger of a sequence, without keys that no later token sees where ``more`` tokens need their room.

        Raises:
            ValueError: even then there is no room.
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
        """Whether keys of any sequence are kept no longer: found without bringing a ledger up to date."""
        ledgers = [self.books.ledgers[row] for row in self.rows]
        return any(sum(ledger.counts) < ledger.total for ledger in ledgers)

    def is_full_with(self, tokens: int) -> bool:
        """Whether ``tokens`` more for each sequence do not fit unless keys are dropped: found without a ledger."""
        return max(self._kept_by_all()) + tokens > self.capacity

    def _kept_by_all(self) -> list[int]:
        """How many keys of each sequence all ranks together keep."""
        ledgers = [self.books.ledgers[row] for row in self.rows]
        return [sum(of.counts) + length - of.total for of, length in zip(ledgers, self.lengths, strict=True)]

    def has_room_for(self, ledger: Ledger) -> bool:
        """Whether a sequence may be kept so."""
        return sum(ledger.counts) <= self.capacity and max(ledger.counts) <= self.store.room

    def ledgers(self) -> list[Ledger]:
        """Who keeps which keys, of each sequence, up to date. Waits for steps made since the last time."""
        self.raise_fault()
        lengths, books = self.lengths, self.books
        for row, length in zip(self.rows, lengths, strict=True):
            ledger = books.ledgers[row]
            # Steps that the host has counted may not have happened, see `raise_fault`.
            longer = length >= ledger.total
            books.ledgers[row] = ledger.with_dealt(length - ledger.total) if longer else ledger.truncated(length)
        return [books.ledgers[row] for row in self.rows]

    def shrink(self, ledgers: Sequence[Ledger]) -> None:
        """Keep only what these ledgers have this rank keep, all of which is there."""
        rank = self.cp.rank
        for n, (row, new) in enumerate(zip(self.rows, ledgers, strict=True)):
            old = self.books.ledgers[row]
            if new is not old and not _begins(new.held[rank], old.held[rank]):
                self._compact(n, old.held[rank], new.held[rank])
        self.record(ledgers)

    def record(self, ledgers: Sequence[Ledger]) -> None:
        """Note who keeps which keys, on the host and on the device. The keys are there."""
        for row, ledger in zip(self.rows, ledgers, strict=True):
            self.books.ledgers[row], self.books.lengths[row] = ledger, ledger.total
        counts = torch.tensor([ledger.counts for ledger in ledgers], dtype=torch.int32)
        totals = torch.tensor([ledger.total for ledger in ledgers], dtype=torch.int32)
        self.store.counts.copy_(upload(counts, self.store.k.device))
        self.store.lengths.copy_(upload(totals, self.store.k.device))

    def grow(self, tokens: int, capturing: bool) -> None:
        """Note that a step has appended ``tokens`` to each sequence, on the device; or will, in every replay."""
        if capturing:
            self.books.stale = self.faults.captured = True
            return
        with self._counting_again():
            self.faults.note()
        for row in self.rows:
            self.books.lengths[row] += tokens

    def raise_fault(self, late: bool = False) -> None:
        """Raise what the device has found wrong in steps. late: only what all ranks know of before the next step."""
        with self._counting_again():
            self.faults.raise_late() if late else self.faults.raise_now()

    @contextmanager
    def _counting_again(self) -> Iterator[None]:
        """After a fault: steps that the host has counted may not have happened."""
        try:
            yield
        except ValueError:
            self.books.stale = True
            raise

    def update(self) -> None:
        """Learn of the device what replays of a captured step have done."""
        if self.books.stale:
            lengths = self.store.lengths.tolist()
            for row, length in zip(self.rows, lengths, strict=True):
                self.books.lengths[row] = length

    def problem(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cp: ContextParallel) -> str | None:
        """Whether tensors that are in order by themselves belong into this cache."""
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
        """Raise on this rank, and on the others, who are in the same call."""
        self.cp.refuse(problem, in_attention=True)

    def _compact(self, n: int, had: Tensor, wanted: Tensor) -> None:
        """Move those keys of a sequence that are at ``wanted`` positions to the front, in place."""
        at = upload(torch.searchsorted(had, wanted), self.store.k.device)
        for x in (self.store.k, self.store.v, self.store.positions):
            x[n, : len(wanted)] = x[n].index_select(0, at)

    def _copy_rows(self, came_from: Tensor) -> None:
        """In place, some tokens at a time: another copy of the whole might not fit."""
        most = max(self.kept())
        for x in (self.store.k, self.store.v, self.store.positions):
            for start in range(0, most, _AT_ONCE):
                part = x[:, start : min(most, start + _AT_ONCE)]
                part.copy_(part.index_select(0, came_from))


def _ints(numbers: object) -> list[int]:
    """Integers of any kind as Python ints; none where any of them, or the whole, is something else."""
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
