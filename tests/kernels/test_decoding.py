"""The decoding kernels in Triton's interpreter: steps over hand-made stores, against dense float64."""

from dataclasses import replace
from itertools import product

import pytest

from distflash.kernels.decoding import DIFFER
from distflash.kernels.triton import decoding_launches
from distflash.kernels.triton.decoding_launches import Knobs, TritonDecoding, choose, splits
from tests import decoding, oracle
from tests.interpreter import small

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
KERNEL = TritonDecoding(interpret=True)


FEATURES = [small(case) for case in decoding.features()]


@pytest.mark.covering(1, dims=decoding.HEAD_DIMS, dtype=oracle.DTYPES)
def test_head_dims(dims, dtype):
    decoding.check(KERNEL, small(decoding.of_head_dims(dims, dtype)))


@pytest.mark.parametrize("case", FEATURES, ids=lambda case: case.name)
def test_as_exact_as_dense(case):
    decoding.check(KERNEL, case)


@pytest.mark.parametrize(
    ("fault", "world_size"),
    [(fault, W) for fault in decoding.FAULTS for W in (1, 3) if W > 1 or decoding.FAULTS[fault] != DIFFER],
)
def test_faults(fault, world_size):
    decoding.check_fault(KERNEL, fault, world_size)


def test_counters_are_zero_after_every_step():
    kernel = TritonDecoding(interpret=True)
    decoding.check(kernel, FEATURES[0])
    assert [counter.any().item() for counter in kernel._counters.values()] == [False]


@pytest.mark.parametrize("knobs", [Knobs(16, 4, 1, 4), Knobs(64, 4, 1, 1)], ids=repr)
@pytest.mark.parametrize("case", FEATURES[-30::10], ids=lambda case: case.name)
def test_other_knobs(case, knobs):
    decoding.check(TritonDecoding(knobs, interpret=True), replace(case, steps=1))


@pytest.mark.parametrize("case", FEATURES[3:9:2], ids=lambda case: case.name)
def test_ends_are_looked_for_in_three_levels(monkeypatch, case):
    """As among so many positions, for so many tokens and parts, that two would take too many registers."""
    monkeypatch.setattr(decoding_launches, "_SEARCHED", 0)
    decoding_launches.layout.cache_clear()
    decoding.check(KERNEL, replace(case, room=300))
    decoding_launches.layout.cache_clear()


@pytest.mark.parametrize(("units", "room", "programs"), [(8, 2**17, 2), (256, 8192, 2), (300, 8192, 2), (40, 4096, 3)])
def test_programs_fill_the_processors(units, room, programs):
    knobs = Knobs(64, 4, 3, programs)
    count = splits(units, room, knobs, 132)
    at_a_time = 132 * programs
    assert count * units / (-(-count * units // at_a_time) * at_a_time) > 0.8
    assert splits(units, 64, knobs, 132) == 1


@pytest.mark.parametrize(("family", "shared"), [("sm_90", 227), ("sm_80", 163), ("sm_86", 99), ("gfx942", 64)])
def test_tiles_fit(family, shared):
    """Into shared memory, and are a power of two, whatever the head dims."""
    for itemsize, d_qk, d_v in product((2, 4), (16, 32, 64, 128, 256), (16, 64, 128, 256)):
        knobs = choose(family, itemsize, d_qk + d_v)
        assert knobs.block_n >= 16 and knobs.block_n & (knobs.block_n - 1) == 0
        assert knobs.block_n * (d_qk + d_v) * itemsize * (knobs.num_stages - 1) < 0.9 * 1024 * shared
