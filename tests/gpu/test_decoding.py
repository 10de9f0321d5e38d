"""The decoding kernels on a GPU, against dense float64: the interpreter's cases, larger ones, steps as CUDA graphs."""

from dataclasses import replace

import pytest
import torch

import distflash as df
from distflash.kernels.decoding import DIFFER
from distflash.kernels.reference_decoding import ReferenceDecoding
from distflash.kernels.triton.decoding_launches import TritonDecoding
from tests import decoding
from tests.decoding import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
KERNEL = TritonDecoding()
LONG = Case(
    "long", lengths=(3001, 4099), steps=2, new=2, room=4200, heads=8, kv_heads=2, d_qk=128, d_v=128,
    dtype=torch.bfloat16,
)  # fmt: skip
WINDOW = df.Window(1000, 0)


@pytest.fixture(autouse=True)
def exact_oracle():
    """The oracle's float32 products must be float32 products."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("case", decoding.cases(), ids=lambda case: case.name)
def test_as_exact_as_dense(case):
    decoding.check(KERNEL, case, "cuda")


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "case",
    [
        LONG,
        replace(LONG, mask=WINDOW, dropped=1500, dtype=torch.float16),
        replace(LONG, mask=df.Causal() & (WINDOW | df.FirstTokens(70)), alibi=True, sinks=True, new=1),
        replace(LONG, mask=df.Causal() & df.Chunked(1000), softcap=9.0, dtype=torch.float32),
        replace(LONG, heads=64, kv_heads=1, new=3),
        replace(LONG, heads=4, kv_heads=4, d_qk=192, new=1),
        replace(LONG, heads=4, kv_heads=4, new=50, mask=df.Causal() & (WINDOW | df.FirstTokens(70))),
    ],
    ids=["plain", "window", "window and first", "chunked", "one key head", "head dims 192/128", "50 tokens"],
)
def test_many_tiles(case, world_size):
    room = case.room if world_size == 1 else 4200 * 3 // (2 * world_size)
    decoding.check(KERNEL, replace(case, world_size=world_size, room=room), "cuda")


@pytest.mark.parametrize(
    ("fault", "world_size"),
    [(fault, W) for fault in decoding.FAULTS for W in (1, 3) if W > 1 or decoding.FAULTS[fault] != DIFFER],
)
def test_faults(fault, world_size):
    decoding.check_fault(KERNEL, fault, world_size, "cuda")


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("mask", [df.Causal(), df.Causal() & (df.Window(40, 0) | df.FirstTokens(3))], ids=repr)
def test_a_graph_replayed_while_the_cache_grows(mask, world_size):
    """50 steps of a graph, and of calls: the same bits. No step waits for the host."""
    case = replace(LONG, mask=mask, lengths=(0, 333, 1500), new=2, steps=51, room=1700, world_size=world_size)
    x, kernel, found = decoding.make_inputs(case, "cuda"), TritonDecoding(), []
    table, scores = decoding.make_table(case, "cuda"), case.scores
    for graphed in (False, True):
        stores = decoding.make_stores(case, x)
        given = [decoding.new_tokens(y, case.lengths, case.new) for y in (x.q, x.k, x.v)]

        def step(given=given, stores=stores):
            if world_size == 1:
                return kernel.alone(*given, stores[0], table, scores, None)
            each = [kernel.attend(*given, store, table, scores, rank) for rank, store in enumerate(stores)]
            messages = torch.stack(each)
            return [kernel.merge(messages, given[0], store, None) for store in stores][-1]

        outs = [step()[0].clone()]
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = step()
        for n in range(1, case.steps):
            lengths = [length + n * case.new for length in case.lengths]
            for to, y in zip(given, (x.q, x.k, x.v), strict=True):
                to.copy_(decoding.new_tokens(y, lengths, case.new))
            if graphed:
                graph.replay()
            outs.append((results if graphed else step())[0].clone())
        assert stores[0].lengths.tolist() == [length + case.steps * case.new for length in case.lengths]
        found.append(torch.stack(outs))
    assert torch.equal(*found)
    truth, plain = decoding.dense(case, x, torch.float64)[0], decoding.dense(case, x, torch.float32, case.dtype)[0]
    decoding.oracle.assert_as_exact("out", found[0].flatten(0, 1), plain, truth, case.dtype)


def test_other_lengths_do_not_recompile():
    from distflash.kernels.triton.decoding import attend_kernel, merge_kernel

    def compiled() -> int:
        caches = [caches[0] for kernel in (attend_kernel, merge_kernel) for caches in kernel.device_caches.values()]
        return sum(map(len, caches))

    for world_size in (1, 2):
        case = replace(LONG, new=1, world_size=world_size)
        decoding.check(KERNEL, case, "cuda")
        before = compiled()
        for lengths in ((0, 1), (16, 17), (1024, 4000)):
            decoding.check(KERNEL, replace(case, lengths=lengths), "cuda")
        assert compiled() == before


def test_the_reference_agrees():
    """On the GPU, as it is the definition."""
    decoding.check(ReferenceDecoding(), LONG, "cuda")
