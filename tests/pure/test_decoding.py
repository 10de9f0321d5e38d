"""The reference for decoding: steps over hand-made stores, against dense attention over all keys."""

import pytest
import torch

from distflash.cache_balance import storing_ranks
from distflash.kernels.decoding import DIFFER
from distflash.kernels.reference_decoding import ReferenceDecoding
from tests import decoding

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("case", decoding.cases(), ids=lambda case: case.name)
def test_as_exact_as_dense(case):
    decoding.check(ReferenceDecoding(), case)


def test_keepers_are_those_with_the_fewest():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        counts = torch.randint(0, 5, (3, 4), generator=generator)
        for b, expected in enumerate(storing_ranks(counts, 6).tolist()):
            kept = counts[b].tolist()
            for rank in expected:
                assert rank == kept.index(min(kept))
                kept[rank] += 1


@pytest.mark.parametrize(
    ("fault", "world_size"),
    [(fault, W) for fault in decoding.FAULTS for W in (1, 3) if W > 1 or decoding.FAULTS[fault] != DIFFER],
)
def test_faults(fault, world_size):
    decoding.check_fault(ReferenceDecoding(), fault, world_size)
