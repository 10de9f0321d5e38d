"""Host decisions of the Hopper kernel's launches."""

import pytest
import torch

from distflash.kernels.hopper.launches import _neighbours


@pytest.mark.parametrize(
    ("blocks", "keys", "expected"),
    [
        (8, 1024, 16),  # 17 heads fill 132 programs: a power of two, so that no group is cut
        (16, 2048, 8),
        (64, 8192, 2),
        (256, 32768, 1),
        (1, 2**20, 1),  # more do not fit into the L2 cache
    ],
)
def test_as_many_heads_at_a_time_as_fill_the_grid(blocks, keys, expected):
    k = torch.empty(1, keys, 8, 128, dtype=torch.bfloat16, device="meta")
    assert _neighbours(blocks, 132, k, k) == expected
