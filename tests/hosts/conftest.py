"""Ranks as processes on gloo, one set a file: a host library leaves its marks on a process.

A file's ``PRELOAD`` is the module that imports its library, so that all of its ranks share one import.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks, preload


@pytest.fixture(scope="module")
def ranks_of(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Ranks]]:
    """Ranks by their number."""
    preload(request.module.PRELOAD)
    started: dict[int, Ranks] = {}

    def ranks_of(count: int) -> Ranks:
        return started.setdefault(count, Ranks(count, "gloo", timeout=200))

    yield ranks_of
    for ranks in started.values():
        ranks.stop()
