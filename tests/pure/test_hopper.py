"""The Hopper kernel without a GPU: what it refuses, and which tiles it takes."""

import pytest
import torch

from distflash.kernels import Hopper, Problem
from distflash.kernels.hopper.tiles import backward_tile, forward_tile

pytestmark = pytest.mark.pure


def reasons(**changes) -> str:
    problem = dict(device=torch.device("cpu"), dtype=torch.bfloat16, heads=4, kv_heads=2, d_qk=128, d_v=128)
    return "; ".join(Hopper().not_supported_reasons(Problem(**problem | changes)))


def test_every_reason_is_listed():
    said = reasons(dtype=torch.float32, d_qk=300, alibi=True)
    for part in ("not on cpu", "not torch.float32", "d_qk = 300", "no ALiBi"):
        assert part in said


def test_outputs_must_fit_where_the_queries_were():
    assert "values as wide as keys" in reasons(d_qk=64, d_v=128)
    for d_qk, d_v in ((128, 64), (192, 128), (80, 128), (16, 64)):
        assert "as wide" not in reasons(d_qk=d_qk, d_v=d_v)


def test_short_dtypes_are_no_reason():
    assert "float" not in reasons(dtype=torch.float16)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_tiles_fit_the_hardware(dim):
    for keys in (0.0, 2.0**20):
        tile = forward_tile(dim, keys)
        loading = 24 if tile.consumers == 2 else 32
        assert 128 * (tile.consumers * tile.registers + loading) <= 2**16
        places = tile.slots * tile.consumers * 64 + 2 * tile.stages * tile.block_n
        assert 2 * dim * places < 227 * 1024
        assert tile.registers % 8 == 0
    if dim <= 128:
        assert 2 * backward_tile(dim).registers + 24 <= 512


def test_queries_that_see_many_keys_share_them_more():
    assert forward_tile(64, 16384).consumers > forward_tile(64, 1024).consumers
    # As many keys, and a mask that cuts through most of their tiles.
    assert forward_tile(64, 4096, density=0.03) == forward_tile(64, 1024)
