"""The kernels in Triton's interpreter, which is turned on for the whole process; `tests/gpu` runs them on a GPU."""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which torch does not do
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests.interpreter import bfloat16_in_the_interpreter, no_work_done_twice, without_overflow_checks


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    full = request.config.getoption("--full")
    with bfloat16_in_the_interpreter(), no_work_done_twice(), nullcontext() if full else without_overflow_checks():
        yield
