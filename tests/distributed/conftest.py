"""Ranks as processes on gloo, kept from test to test."""

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """Ranks by their number."""
    started: dict[int, Ranks] = {}

    def ranks_of(count: int) -> Ranks:
        return started.setdefault(count, Ranks(count, "gloo", timeout=60))

    yield ranks_of
    for ranks in started.values():
        ranks.stop()
