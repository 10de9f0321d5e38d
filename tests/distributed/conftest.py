"""Ranks as processes on gloo, kept from test to test.

A file's ``PRELOAD`` is a module whose import takes seconds. It is loaded once, before the ranks are forked.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import trained_run
from tests.ranks import Ranks, preload


@pytest.fixture(autouse=True, scope="session")
def preloaded(request: pytest.FixtureRequest) -> None:
    """What the files of all chosen tests ask for."""
    modules = {item.module for item in request.session.items if isinstance(item, pytest.Function)}
    preload(*sorted({module.PRELOAD for module in modules if hasattr(module, "PRELOAD")}))


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """Ranks by their number."""
    started: dict[int, Ranks] = {}

    def ranks_of(count: int) -> Ranks:
        return started.setdefault(count, Ranks(count, "gloo", timeout=100))

    yield ranks_of
    for ranks in started.values():
        ranks.stop()


@pytest.fixture(scope="session")
def trained(ranks_of: Callable[[int], Ranks], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks; see `tests.trained_run`."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(trained_run.TEXT)
    assert ranks_of(2).run(trained_run.train, folder / "run", folder / "text.txt") == [0, 0]
    return folder / "run"
