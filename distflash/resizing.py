"""A cache of another size that has what one keeps: more room, or some of its sequences, also more than once."""

from __future__ import annotations

from collections.abc import Sequence

from distflash.cache import Cache
from distflash.integers import as_int
from distflash.validation import came


def resized(cache: Cache, capacity: int, sequences: Sequence[int] | None = None) -> Cache:
    """A new cache with room for ``capacity`` tokens of each sequence, which has what ``cache`` keeps.

    Asks no other rank: every rank has to call it alike.

    Args:
        capacity: at least what is kept of a sequence.
        sequences: which sequences the new one has, in this order; None for all.

    Raises:
        ValueError: there is no such sequence, or what is kept would not fit.
    """
    chosen = list(range(cache.batch) if sequences is None else sequences)
    if not chosen or not all(as_int(n) is not None and 0 <= n < cache.batch for n in chosen):
        raise ValueError(f"sequences: expected some integers from 0 to {cache.batch - 1}, got {came(sequences)}")
    store, ledgers = cache.store, cache.ledgers()
    other = Cache(
        cache.cp,
        batch=len(chosen),
        kv_heads=store.k.shape[2],
        d_qk=store.k.shape[3],
        d_v=store.v.shape[3],
        capacity=capacity,
        dtype=store.k.dtype,
        device=store.k.device,
    )
    if not all(other.has_room_for(ledgers[n]) for n in chosen):
        most = max(sum(ledgers[n].counts) for n in chosen)
        raise ValueError(f"capacity: {most} tokens of a sequence are kept; expected at least as many, got {capacity}")
    new = other.store
    for n, row in enumerate(chosen):
        count = ledgers[row].counts[cache.cp.rank]
        for into, x in ((new.k, store.k), (new.v, store.v), (new.positions, store.positions)):
            into[n, :count] = x[row, :count]
    other.record([ledgers[n] for n in chosen])
    return other
