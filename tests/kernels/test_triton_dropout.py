"""Attention dropout in the Triton kernel: the pairs that are dropped, and the results, against dense float64."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from distflash import masks
from distflash.dropout import Dropout
from distflash.intervals import build
from distflash.kernels import Triton
from distflash.kernels.triton import launches
from distflash.kernels.triton.dropout import kept, places, stream_of
from distflash.kernels.triton.tiles import Tile, Tiles
from distflash.layouts import Striped, Zigzag
from tests import oracle

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
TENTH = Dropout(6554, torch.tensor(7))
HALF = Dropout(1 << 15, torch.tensor(-(2**40) - 3), first_head=5)
SMALL = oracle.Case(
    "small", seq_len=100, batch=2, heads=4, kv_heads=2, d_qk=40, d_v=24, dtype=torch.bfloat16, dropout=HALF
)


@triton.jit
def mask_kernel(
    q_positions, k_positions, dropout, out, queries, keys, heads,
    BLOCK: tl.constexpr, IN_TILES: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which pairs are kept, int8 ``[B, H, T, K]``. A program has a tile of one head; sizes need not fill it."""
    plane, row, column = tl.program_id(0), tl.program_id(1) * BLOCK, tl.program_id(2) * BLOCK
    stream = stream_of(dropout, plane // heads, plane % heads)
    q_places = places(q_positions, row, queries, BLOCK, 1 if TRANSPOSED else 0, IN_TILES)
    k_places = places(k_positions, column, keys, BLOCK, 0 if TRANSPOSED else 1, IN_TILES)
    tile = kept(stream, q_places, k_places)
    if TRANSPOSED:
        tile = tile.trans()
    rows, columns = (row + tl.arange(0, BLOCK))[:, None], (column + tl.arange(0, BLOCK))[None, :]
    at = out + (plane * queries + rows) * keys + columns
    tl.store(at, tile.to(tl.int8), mask=(rows < queries) & (columns < keys))


def mask_of(dropout, batch, heads, q_positions, k_positions, in_tiles, transposed=False, block=64):
    queries, keys = len(q_positions), len(k_positions)
    out = torch.full((batch, heads, queries, keys), -1, dtype=torch.int8)
    grid = batch * heads, triton.cdiv(queries, block), triton.cdiv(keys, block)
    given = dropout.seed, dropout.threshold, dropout.first_head
    mask_kernel[grid](q_positions, k_positions, given, out, queries, keys, heads, block, in_tiles, transposed)
    return out


def tiles_at(*starts):
    return torch.cat([torch.arange(start, start + 64) for start in starts]).int()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", [0, -1, 2**32 + 5, -(2**63)])
def test_drops_the_pairs_of_the_definition(seed, transposed):
    """Tiles of consecutive positions from a multiple of 16 on, and the same positions without that knowledge."""
    q, k = tiles_at(16, 2**31 - 64)[:100], tiles_at(4096, 48)[:70]
    dropout = Dropout(30000, torch.tensor(seed), first_head=3)
    expected = dropout.kept(2, range(2), q, k)
    for in_tiles in (True, False):
        assert torch.equal(mask_of(dropout, 2, 2, q, k, in_tiles, transposed), expected.to(torch.int8))


@pytest.mark.parametrize("threshold", [1, 6554, 65535])
def test_drops_the_pairs_of_the_definition_at_any_positions(threshold):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(2**31 - 1, (n,), generator=generator, dtype=torch.int32) for n in (65, 30))
    dropout = Dropout(threshold, torch.tensor(11))
    assert torch.equal(mask_of(dropout, 1, 2, q, k, False), dropout.kept(1, range(2), q, k).to(torch.int8))


def cases():
    """Tiles of consecutive positions as well as others, in one pass and in several."""
    wide, half = torch.float32, torch.bfloat16
    return [
        *(oracle.Case(f"plain {dtype}", batch=2, dtype=dtype, dropout=TENTH) for dtype in (wide, half, torch.float16)),
        oracle.Case("full, most dropped", masks.Full(), dropout=replace(HALF, threshold=60000)),
        oracle.Case("length 1", seq_len=1, dropout=HALF),
        oracle.Case("grouped", seq_len=191, heads=3, kv_heads=1, dropout=HALF, dtype=half, dlse=True),
        oracle.Case("window", masks.Window(40, 17), 200, dropout=HALF),
        oracle.Case("documents", masks.Causal() & masks.Documents((0, 3, 100, 101, 200)), 200, dropout=HALF),
        *(
            replace(SMALL, name=f"all at once {dtype}", dtype=dtype, scale=scale, softcap=5.0, alibi=True, sinks=True,
                    dlse=True, mask=masks.Window(50, 10))
            for dtype, scale in ((wide, 0.5), (half, -0.3))
        ),
        oracle.Case("two hops", seq_len=260, world_size=2, rank=1, dropout=TENTH, dtype=half, sinks=True),
        oracle.Case("a hop without work", seq_len=260, world_size=2, rank=0, sinks=True, dropout=TENTH),
        oracle.Case("zigzag in tiles", seq_len=512, layout=Zigzag(), world_size=2, heads=1, kv_heads=1, dropout=HALF),
        oracle.Case("zigzag", seq_len=250, layout=Zigzag(), world_size=2, rank=1, dropout=HALF),
        oracle.Case("striped", masks.Window(64, 0), 301, Striped(), 3, 1, dropout=HALF, dtype=half),
        oracle.Case("rows that see nothing", oracle.Blind(40, 90), 256, world_size=2, dropout=HALF, dlse=True),
    ]  # fmt: skip


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_as_exact_as_dense(case):
    oracle.check(Triton(), case)


def test_cases_are_of_both_kinds():
    kinds = {build(case.geometry, case.rank, case.rank)[0].in_tiles for case in cases() if case.world_size > 1}
    assert kinds == {True, False}


@pytest.mark.parametrize(
    "case",
    oracle.window_rings(2, 800, heads=2, kv_heads=1, d_qk=16, d_v=16, dtype=torch.bfloat16, dropout=HALF)[::4],
    ids=lambda case: case.name,
)
def test_rows_left_out_of_passes(case):
    oracle.check(Triton(), case)


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (128, 32), (256, 64)])
def test_other_tiles(block_m, block_n):
    """The last of them are larger than what positions are consecutive in."""
    tile = Tile(block_m, block_n, num_warps=4, num_stages=1)
    case = replace(
        SMALL, mask=masks.Window(40, 3), layout=Zigzag(), world_size=2, seq_len=512, batch=1, heads=2, kv_heads=1
    )
    oracle.check(Triton(tiles=Tiles(tile, tile, tile)), case)


def test_without_descriptors(monkeypatch):
    monkeypatch.setattr(launches, "DESCRIPTORS", ())
    oracle.check(Triton(), replace(SMALL, softcap=5.0, alibi=True, sinks=True))


def test_heads_of_a_call_may_be_computed_apart():
    """A subset of the heads drops what all of them drop."""
    case = replace(SMALL, dtype=torch.float32)
    x = oracle.make_inputs(case)
    whole = oracle.run(Triton(), case, x)
    heads = dict(q=x.q[:, :, 2:], dout=x.dout[:, :, 2:], k=x.k[:, :, 1:], v=x.v[:, :, 1:])
    part = oracle.run(Triton(), case, replace(x, **heads, scores=x.scores.of_heads(slice(2, 4))))
    for name, dim, of_queries in (("out", 2, True), ("dq", 2, True), ("dk", 2, False), ("dv", 2, False)):
        start = 2 if of_queries else 1
        assert torch.equal(part[name], whole[name].narrow(dim, start, whole[name].shape[dim] - start)), name
