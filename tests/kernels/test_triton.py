"""The Triton kernel in Triton's interpreter, against dense float64."""

import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import distflash as df
from distflash import masks
from distflash.kernels import Triton
from distflash.kernels.base import Problem
from distflash.kernels.triton import launches
from distflash.kernels.triton.tiles import Tile, Tiles
from distflash.layouts import Zigzag
from tests import dense, oracle
from tests.interpreter import small

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
SMALL = oracle.Case("small", seq_len=100, batch=2, heads=4, kv_heads=2, d_qk=40, d_v=24, dtype=torch.bfloat16)
FINE = Problem(torch.device("cpu"), torch.bfloat16, heads=4, kv_heads=2, d_qk=128, d_v=128)


def in_two_tiles(case):
    """Those of three tiles of 64 tokens, whose last one is short as well, in two."""
    return replace(case, seq_len=82) if case.seq_len == 130 else case


FEATURES = [in_two_tiles(small(case)) for case in oracle.features()]


@pytest.mark.covering(1, dims=oracle.HEAD_DIMS, dtype=oracle.DTYPES)
def test_head_dims(dims, dtype):
    oracle.check(Triton(), oracle.of_head_dims(dims, dtype))


@pytest.mark.parametrize("case", FEATURES, ids=lambda case: case.name)
def test_as_exact_as_dense(case):
    oracle.check(Triton(), case)


@pytest.mark.parametrize(
    "case",
    [SMALL, *(case for case in oracle.cases() if case.sinks or case.scale or "two hops" in case.name)],
    ids=lambda case: case.name,
)
def test_the_largest_scores(case):
    oracle.check(Triton(), case, maxima=True)


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        replace(SMALL, dtype=torch.float32, softcap=5.0, alibi=True, sinks=True),
        replace(SMALL, mask=masks.Window(30, 4), layout=Zigzag(), world_size=2, seq_len=150),
    ],
    ids=["plain", "features", "two hops"],
)
def test_without_descriptors(monkeypatch, case):
    """As on hardware that has none, where tiles are loaded by pointers."""
    monkeypatch.setattr(launches, "DESCRIPTORS", ())
    oracle.check(Triton(), case)


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (64, 16), (128, 32)])
def test_other_tiles(block_m, block_n):
    tile = Tile(block_m, block_n, num_warps=4, num_stages=1)
    oracle.check(Triton(tiles=Tiles(tile, tile, tile)), replace(SMALL, mask=masks.Window(40, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_over_ranks(dtype):
    """Fixed chunks, of which the last is short, under a mask of two parts and of one."""
    mask = df.Causal() & (masks.Window(5) | df.FirstTokens(3)) if dtype == torch.float32 else df.Causal()
    p = dense.Problem(mask, 22, 1, 2, 1, d_qk=24, d_v=16, softcap=3.0, alibi=True, sinks=True, dtype=dtype)
    x, layout, schedule = dense.make_inputs(p), df.WholeChunks(Zigzag(), 8), df.Reproducible(8)
    one_rank, *others = (dense.on_ranks(p, x, W, layout, Triton(interpret=True), schedule) for W in (1, 2))
    for got in others:
        assert all(torch.equal(got[name], one_rank[name]) for name in one_rank)
    if dtype == torch.float32:
        dense.assert_no_less_exact(p, x, one_rank, dense.on_ranks(p, x, 1, Zigzag()))


@pytest.mark.parametrize("schedule", [df.Ring(), df.PassQuery()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_union_over_ranks(dtype, schedule):
    """States and sums of dQ that travel, parts that add to dK and dV, and gradients computed apart; see `overlap`."""
    mask = masks.Window(9, 2) | df.FirstTokens(5)
    sinks = dtype == torch.float32  # their gradients are four numbers, too few to compare the error of a short out by
    p = dense.Problem(mask, 30, 1, 4, 2, d_qk=24, d_v=16, softcap=3.0, alibi=True, sinks=sinks, dtype=dtype)
    x = dense.make_inputs(p)
    kernel = Triton(interpret=True)
    one_rank, got = (dense.on_ranks(p, x, W, df.Contiguous(), kernel, schedule) for W in (1, 2))
    dense.assert_no_less_exact(p, x, got, one_rank)
    if dtype == torch.float32:  # no P is rounded, as in plain torch
        dense.assert_no_less_exact(p, x, one_rank, dense.on_ranks(p, x, 1, Zigzag()))


WINDOW_RINGS = oracle.window_rings(3, 800, heads=1, kv_heads=1, d_qk=16, d_v=16, dtype=torch.bfloat16)


@pytest.mark.covering(1, layout=range(3), mask=range(2), rank=range(3))
def test_rows_left_out_of_passes(layout, mask, rank):
    """Groups of 384 rows, the last of them short."""
    oracle.check(Triton(), WINDOW_RINGS[6 * layout + 3 * mask + rank])


@pytest.mark.parametrize("block_m", [16, 256])
def test_rows_left_out_with_tiles_of_any_size(block_m):
    """Also of those by which groups of rows cannot be divided: they are never left out then."""
    tile = Tile(block_m, 64, num_warps=4, num_stages=1)
    case = replace(
        SMALL, mask=masks.Window(100, 0), layout=Zigzag(), world_size=2, seq_len=1000, batch=1, heads=1, kv_heads=1
    )
    oracle.check(Triton(tiles=Tiles(tile, tile, tile)), case)


@pytest.mark.parametrize("case", [case for case in FEATURES if case.world_size > 1], ids=lambda case: case.name)
def test_all_rows_in_all_passes(case):
    oracle.check(Triton(), case, live=False)


def shifted(x: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of 16 bytes."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


STRIDED = replace(SMALL, heads=2)


@cache
def packed(descriptors, one_sequence):
    """The results of the same numbers in contiguous tensors."""
    x = oracle.make_inputs(STRIDED)
    names = ("q", "k", "v", "dout") if one_sequence else ()
    plain = {name: getattr(x, name)[:1].expand_as(getattr(x, name)).contiguous() for name in names}
    return oracle.run(Triton(), STRIDED, replace(x, **plain))


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize(
    "laid_out",
    [
        shifted,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
        lambda x: torch.cat([x, x[..., :4]], 3)[..., : x.shape[3]],
        lambda x: x[:1].expand_as(x),
    ],
    ids=["unaligned", "heads first", "dims not last", "part of a sequence", "part of heads", "odd rows", "expanded"],
)
def test_any_strides(monkeypatch, laid_out, descriptors):
    if not descriptors:
        monkeypatch.setattr(launches, "DESCRIPTORS", ())
    x = oracle.make_inputs(STRIDED)
    given = replace(x, q=laid_out(x.q), k=laid_out(x.k), v=laid_out(x.v), dout=laid_out(x.dout))
    got, want = oracle.run(Triton(), STRIDED, given), packed(descriptors, one_sequence=not torch.equal(given.q, x.q))
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_a_gradient_of_lse_that_is_nan_where_nothing_was_seen():
    case = replace(SMALL, mask=oracle.Blind(20, 50), dlse=True)
    x = oracle.make_inputs(case)
    x.dlse[:, :, ~x.visible.any(1)] = torch.nan
    assert all(not value.isnan().any() for value in oracle.run(Triton(), case, x).values())


def test_refuses_what_it_cannot_do():
    assert Triton(interpret=True).not_supported_reasons(FINE) == []
    # The interpreter is on in this process, and for all that nobody gets it who did not ask for it.
    assert "cpu" in Triton().not_supported_reasons(FINE)[0]
    odd = replace(FINE, dtype=torch.float64, d_qk=20, d_v=264)
    assert len(Triton().not_supported_reasons(odd)) == 4


def test_needs_no_triton_to_be_imported():
    script = """if True:
        import sys
        sys.modules["triton"] = None
        import torch, distflash.kernels as kernels
        problem = kernels.Problem(torch.device("cpu"), torch.float32, 1, 1, 64, 64)
        reasons = kernels.Triton().not_supported_reasons(problem)
        assert "not installed" in reasons[0], reasons
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=250)


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_numbers_a_head_may_have_any_stride(name):
    """The kernel reads them one after the other; a column of a table is not laid out so."""
    torch.manual_seed(0)
    cp = df.ContextParallel(df.transport.Alone(), kernel=Triton(interpret=True))
    q, k, v, table = torch.randn(1, 20, 4, 16), torch.randn(1, 20, 2, 16), torch.randn(1, 20, 2, 16), torch.randn(4, 3)
    column = table[:, 1]
    got, want = (df.attention(q, k, v, cp=cp, **{name: x}) for x in (column, column.contiguous()))
    assert torch.equal(got, want)
