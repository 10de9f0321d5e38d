"""All tests here run with poisoned memory, see `tests.poison`."""

import pytest

from tests.poison import poison_memory


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    poison_memory()
    yield
    poison_memory(False)
