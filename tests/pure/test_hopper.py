"""The Hopper kernel without a GPU: supported problems, and choice of tiles."""

import pickle
from types import SimpleNamespace

import pytest
import torch

import distflash as df
from distflash.geometry import Geometry
from distflash.kernels import Hopper, Problem
from distflash.kernels.base import BackwardContext, KeyGradient, Keys, QueryGradient, Scores
from distflash.kernels.hopper.tiles import backward_tile, forward_tile, padded
from distflash.kernels.machine import MACHINES
from distflash.overlap import overlap

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


@pytest.mark.parametrize("margin", [-1, 1.5, True, "8"])
def test_a_margin_is_a_number_of_multiprocessors(margin):
    with pytest.raises(ValueError, match="margin"):
        Hopper(margin=margin)


def test_short_dtypes_are_no_reason():
    assert "float" not in reasons(dtype=torch.float16)


@pytest.mark.parametrize(("d_qk", "d_v"), [(64, 64), (128, 128), (192, 128), (256, 128), (256, 256)])
def test_tiles_fit_the_hardware(d_qk, d_v):
    for keys in (0.0, 2.0**20):
        tile = forward_tile(d_qk, d_v, keys)
        loading = 24 if tile.consumers == 2 else 32
        assert 128 * (tile.consumers * tile.registers + loading) <= 2**16
        elements = padded(d_qk) * (tile.slots * tile.consumers * 64 + tile.stages * tile.block_n)
        elements += padded(d_v) * tile.stages * tile.block_n
        assert 2 * elements < 227 * 1024
        assert tile.registers % 8 == 0
    assert 2 * backward_tile(d_qk, d_v).registers + 24 <= 512


def test_queries_that_see_many_keys_share_them_more():
    assert forward_tile(64, 64, 16384).consumers > forward_tile(64, 64, 1024).consumers


@pytest.mark.parametrize(("d_qk", "d_v"), [(192, 128), (256, 128), (136, 136), (192, 192), (256, 192), (256, 256)])
def test_warpgroups_share_the_columns_of_wide_queries(d_qk, d_v):
    from distflash.kernels.hopper.backward_wide import at_once, query_parts

    first, second = (query_parts.fn(w, d_qk, d_v) for w in (0, 1))
    assert second[0] == 0
    assert second[1] == first[0]
    assert sum(first) == -(-d_qk // 64)
    for w, (part, parts) in enumerate((first, second)):
        early = at_once.fn(w, d_qk, d_v)
        assert 1 <= early <= parts
        for start, width in ((part, early), (part + early, parts - early)):
            assert width in (0, 1, 2)  # powers of two, which begin at multiples of themselves
            assert not width or start % width == 0


def test_a_tile_by_columns_is_not_deterministic():
    with pytest.raises(ValueError, match=r"^Hopper\(backward_tile\): with deterministic=True"):
        Hopper(deterministic=True, backward_tile=backward_tile(256, 256))


def one_backward(monkeypatch, of_plan: bool):
    """What the deterministic kernel launches of a plan's only backward pass: its tables, and the pass."""
    from distflash.kernels.hopper import kernel as module

    made = Hopper(deterministic=True, machine=MACHINES["sm_90"])
    plan = df.Ring().plan(Geometry.of_sequence(df.Causal(), df.Zigzag(), 300, 1), 0)
    cpu = torch.device("cpu")
    (each,) = (overlap(plan, 2, 1, made.abilities(cpu), True) if of_plan else plan).backward_passes
    launched = []
    for name in ("_backward", "_rounding"):
        replays = SimpleNamespace(run=lambda key, tensors, build, name=name: launched.append((name, tensors)))
        monkeypatch.setattr(module, name, replays)
    q, k, v, dq, dk, dv = (torch.zeros(1, 300, heads, 128, dtype=torch.bfloat16) for heads in (4, 2, 2, 4, 2, 2))
    semaphores = torch.full((4, 5), -1, dtype=torch.int32)
    lse = torch.zeros(1, 4, 300)
    saved = BackwardContext(q, q, lse, lse_delta=lse, dq_accum=torch.zeros(8), semaphores=semaphores)
    made.backward(saved, Keys(k, v, each.visible[0]), each, Scores(1.0), QueryGradient(dq, None), KeyGradient(dk, dv))
    (_, tensors), _ = launched
    assert tensors[-2] is semaphores
    return semaphores, tensors[-1], each


def test_the_order_of_dq_is_a_table_of_the_plan(monkeypatch):
    """So that a pass launches nothing to make it, and a CUDA graph reads what outlives it."""
    monkeypatch.setattr("distflash.kernels.hopper.kernel.turns_of", None)
    semaphores, earlier, each = one_backward(monkeypatch, of_plan=True)
    assert earlier is each.turns.earlier
    assert torch.equal(semaphores, each.turns.ended.expand(4, -1))


def test_a_pass_without_the_table_has_it_made(monkeypatch):
    semaphores, earlier, _ = one_backward(monkeypatch, of_plan=False)
    expected, found, _ = one_backward(monkeypatch, of_plan=True)
    assert torch.equal(semaphores, expected) and torch.equal(earlier, found)


def test_equal_kernels_have_one_identity_and_copies_have_their_own():
    """A pickled copy may meet other kernels in its process, whose launches it must not be given."""
    kernel = Hopper(margin=3)
    assert kernel.identity is Hopper(margin=3).identity
    assert kernel.identity not in (Hopper().identity, Hopper(margin=3, deterministic=True).identity)
    assert pickle.loads(pickle.dumps(kernel)).identity is not Hopper(margin=4).identity
