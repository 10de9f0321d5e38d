"""Attention dropout on a GPU: the kernels' results beside dense attention with the mask of `dropout`."""

from dataclasses import replace

import pytest
import torch

import distflash as df
from distflash import masks
from distflash.dropout import Dropout, threshold_of
from distflash.kernels import Hopper, Triton
from distflash.layouts import Contiguous, Striped, Zigzag
from tests import oracle

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


def on_hopper_only(kernel, name):
    return pytest.param(kernel, marks=pytest.mark.skipif(not on_hopper, reason="no Hopper GPU here"), id=name)


KERNELS = [on_hopper_only(Hopper(), "hopper"), pytest.param(Triton(), id="triton")]
IN_ORDER = [on_hopper_only(Hopper(deterministic=True), "hopper, in order")]

BASE = oracle.Case(
    "dropout", seq_len=1536, heads=4, kv_heads=2, d_qk=64, d_v=64, dtype=torch.bfloat16, batch=2,
    dropout=Dropout(threshold_of(0.2), torch.tensor(-(2**61) + 12345), first_head=5),
)  # fmt: skip
CASES = {
    "causal": BASE,
    "full, odd": replace(BASE, mask=masks.Full(), seq_len=1501),
    "one rank of two, zigzag in tiles": replace(BASE, layout=Zigzag(), world_size=2, rank=1),
    "one rank of two, zigzag": replace(BASE, layout=Zigzag(), world_size=2, seq_len=1501),
    "one rank of three, striped": replace(BASE, layout=Striped(), world_size=3, rank=2, seq_len=1501),
    "window": replace(BASE, mask=masks.Window(300, 70), seq_len=1501, world_size=2, layout=Contiguous(), rank=1),
    "documents, everything": replace(
        BASE, mask=masks.Causal() & masks.Documents((0, 3, 130, 131, 700, 1536)), softcap=5.0, sinks=True, dlse=True
    ),
    "rows that see nothing": replace(BASE, mask=oracle.Blind(300, 900)),
}


@pytest.fixture(autouse=True)
def exact_oracle():
    """The oracle's float32 products must be float32 products."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", [*KERNELS, *IN_ORDER])
def test_as_exact_as_dense(kernel, name, dims):
    case = replace(CASES[name], d_qk=dims[0], d_v=dims[1])
    oracle.check(kernel, case, "cuda")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_seed_in_memory_that_changes(kernel):
    """A captured call reads the seed when it is replayed."""
    cp = df.ContextParallel(df.transport.Alone(), kernel=kernel)
    q, k, v = (torch.randn(1, 512, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    seed = torch.tensor(1, device="cuda")

    def call():
        return df.attention(q, k, v, mask=df.Causal(), cp=cp, dropout_p=0.3, dropout_seed=seed)

    first = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    assert torch.equal(out, first)
    seed.fill_(2)
    graph.replay()
    assert not torch.equal(out, first)
    assert torch.equal(out, call())
