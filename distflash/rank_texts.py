"""Exchange of short texts between ranks, and propagation of errors to all ranks.

Texts go through the process group's store. Collectives would not work after an error, since ranks have to call them in
the same order.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from distflash.transport import Distributed, Guarded, Transport

_POLL = 0.02  # seconds between polls of the store
_GRACE = 2.0  # seconds in which the other ranks read what they were sent before this rank goes on, and may end
_RELEASE = 3.0  # seconds to wait for `release`, which then continues in its thread


@dataclass
class RankTexts:
    """All ranks of ``transport``. They make the same calls in the same order, until one of them raises.

    Args:
        name: of the work, the same on every rank; a prefix of keys in the store.
        release: on a rank that failed, called with the error message if others have not noticed it, to end their waits.
        patience: timeout in seconds; by default torch's.
    """

    transport: Transport
    name: str
    release: Callable[[str], None] | None = None
    patience: float = 1800.0
    _store: dist.Store | None = field(init=False)
    _prefix: str = field(init=False)
    _count: int = field(default=0, init=False)
    _told: bool = field(default=False, init=False)  # this rank knows another's error

    def __post_init__(self) -> None:
        self._store = _store_of(self.transport)
        turn = self._store.add(f"{self.name}/{self.transport.rank}", 1) if self._store else 0
        self._prefix = f"{self.name}/{turn}"

    def exchange(self, text: str) -> list[str]:
        """Every rank's text, by rank.

        Rank 0 returns last, as it is also the last to raise, since the store may be in its process: if it ended, the
        others could read nothing more. The store may also be in a process that is not of this group, and end with it.

        Raises:
            ValueError, RuntimeError: another rank raised a ValueError, or another error, within `sharing_errors`.
        """
        if self._store is None:
            return gather_texts(text, self.transport)
        self._count += 1
        keys = self._keys(str(self._count))
        self._store.set(keys[self.transport.rank], text)
        give_up = time.monotonic() + self.patience
        while True:
            failed = self._failed()  # asked before the keys: whoever fails after an exchange has set its key in it
            if self._store.check(keys):
                texts = [self._store.get(key).decode() for key in keys]
                self._have_read(f"{self._count}/read")
                return texts
            if failed:
                self._raise_failure()
            if time.monotonic() > give_up:
                raise RuntimeError(f"{self.name}: some rank did not come within {self.patience:g} s")
            time.sleep(_POLL)

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """A context whose errors are raised on all ranks: within it, or at their next `exchange`.

        Raises:
            The error itself on the rank that raised first; a ValueError or RuntimeError with its message on the others.
        """
        try:
            yield
        except Exception as error:
            with suppress(dist.DistError):  # the store has ended with its rank: nobody is left to tell
                self._share(error)
            raise

    def _share(self, error: Exception) -> None:
        """Tell the other ranks, or raise what another rank told before, unless this error is the same."""
        if self._store is None or self.transport.world_size == 1 or self._told:
            return
        words = f"{type(error).__name__}: {error}"
        if self._failed():
            self._raise_failure(error, words)
            return
        self._store.set(f"{self._prefix}/failed", json.dumps([self.transport.rank, words]))
        self._store.set(self._keys("noticed")[self.transport.rank], "")  # it may fail at the same time as others
        if not self._come("noticed"):
            self._release(words)

    def _have_read(self, what: str) -> None:
        """Set this rank's key, its last request to the store here; rank 0 waits for the others' keys."""
        assert self._store is not None
        self._store.set(self._keys(what)[self.transport.rank], "")
        if self.transport.rank == 0:
            self._come(what)

    def _come(self, what: str) -> bool:
        """Wait until every rank has set its key. Returns False if some rank did not in time."""
        assert self._store is not None
        give_up = time.monotonic() + _GRACE
        while not self._store.check(self._keys(what)):
            if time.monotonic() > give_up:
                return False
            time.sleep(_POLL)
        return True

    def _keys(self, what: str) -> list[str]:
        return [f"{self._prefix}/{what}/{rank}" for rank in range(self.transport.world_size)]

    def _release(self, words: str) -> None:
        """Call `release` in a thread, since it may block."""
        if self.release is not None:
            thread = threading.Thread(target=_quietly, args=(self.release, words), daemon=True)
            thread.start()
            thread.join(_RELEASE)

    def _failed(self) -> bool:
        return self._store is not None and self._store.check([f"{self._prefix}/failed"])

    def _raise_failure(self, mine: Exception | None = None, mine_in_words: str = "") -> None:
        """Raise the error of the rank that failed, unless this rank's own is the same."""
        assert self._store is not None
        rank, words = json.loads(self._store.get(f"{self._prefix}/failed"))
        self._told = True
        self._have_read("noticed")
        if words == mine_in_words:
            return
        kind = ValueError if words.startswith("ValueError: ") else RuntimeError
        raise kind(
            f"{self.name}: rank {rank} raised {words}. This is rank {self.transport.rank}, which stops"
        ) from mine


def _quietly(work: Callable[[str], None], words: str) -> None:
    try:
        work(words)
    except Exception:
        return  # the first error is raised instead


def _store_of(transport: Transport) -> dist.Store | None:
    """The group's store; None for simulated ranks, which the simulator ends together."""
    inner = transport.inner if isinstance(transport, Guarded) else transport
    return inner.store if isinstance(inner, Distributed) else None


def gather_texts(text: str, transport: Transport) -> list[str]:
    """Every rank's text, by rank, with a collective. All ranks must call."""
    encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=transport.device)
    return [bytes(part.tolist()).decode() for part in transport.all_gather(encoded)]
