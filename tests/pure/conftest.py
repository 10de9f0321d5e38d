"""Every test here runs on poisoned memory."""

import pytest

from tests.poison import poison_memory


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    poison_memory()
    yield
    poison_memory(False)
