"""The kernels in Triton's interpreter, which is turned on for the whole process; `tests/gpu` runs them on a GPU."""

import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which torch does not do
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests.interpreter import bfloat16_in_the_interpreter


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> Iterator[None]:
    with bfloat16_in_the_interpreter():
        yield
