"""Chunks and decoding steps through a cache, with GPU kernels and CUDA graphs."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist

import distflash as df
from distflash.transport import Simulator
from tests.gpu.problems import BARS
from tests.ranks import Ranks

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Case:
    name: str
    mask: df.Mask = field(default_factory=df.Causal)
    heads: int = 4
    kv_heads: int = 2
    d_qk: int = 64
    d_v: int = 64
    batch: int = 1
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    dtype: torch.dtype = torch.bfloat16
    kernel: df.kernels.Kernel | None = None


CASES = [
    Case("causal"),
    Case("two of a batch", batch=2),
    Case("window", df.Window(150)),
    Case("window and first keys", df.Causal() & (df.Window(100) | df.FirstTokens(5)), sinks=True),
    Case("documents", df.Causal() & df.Documents([0, 3, 130, 401, 900])),
    Case("multi-query, D128", heads=8, kv_heads=1, d_qk=128, d_v=128),
    Case("192 and 128", d_qk=192, d_v=128),
    Case("softcap", softcap=5.0),
    Case("ALiBi", alibi=True),
    Case("sinks, fp16", sinks=True, dtype=torch.float16),
    Case("float32", dtype=torch.float32),
    Case("portable kernel", kernel=df.kernels.Triton(), sinks=True),
]
# A chunk is ("chunk", tokens), a step of decoding ("step", tokens).
CALLS = [("chunk", 301), ("chunk", 1), ("step", 1), ("chunk", 130), *[("step", 1)] * 5, ("step", 3), ("chunk", 77)]
TOKENS = sum(tokens for _, tokens in CALLS)


def inputs(case: Case) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    dims = ((case.heads, case.d_qk), (case.kv_heads, case.d_qk), (case.kv_heads, case.d_v))
    return tuple(
        torch.randn(case.batch, TOKENS, *dim, generator=generator, dtype=torch.float64).to(case.dtype).cuda()
        for dim in dims
    )


def keywords(case: Case) -> dict:
    generator = torch.Generator().manual_seed(1)
    per_head = [torch.rand(case.heads, generator=generator).cuda() for _ in range(2)]
    return dict(
        mask=case.mask,
        softcap=case.softcap,
        sinks=per_head[0] if case.sinks else None,
        alibi_slopes=per_head[1] / 8 if case.alibi else None,
    )


def through(case: Case, cp: df.ContextParallel) -> torch.Tensor:
    """The whole sequence, call by call, through a cache whose memory was full of NaN."""
    q, k, v = inputs(case)
    cache = df.Cache(
        cp,
        batch=case.batch,
        kv_heads=case.kv_heads,
        d_qk=case.d_qk,
        d_v=case.d_v,
        capacity=TOKENS,
        dtype=case.dtype,
        device="cuda",
    )
    cache.store.k.fill_(torch.nan)
    cache.store.v.fill_(torch.nan)
    outs, at = [], 0
    for kind, tokens in CALLS:
        new = [x[:, at : at + tokens] for x in (q, k, v)]
        if kind == "step":
            outs.append(df.decode(*new, cache=cache, **keywords(case)))
        else:
            local = df.attention(*map(cp.shard, new), cp=cp, cache=cache, seq_len=tokens, **keywords(case))
            outs.append(cp.unshard(local))
        at += tokens
    assert cache.length == TOKENS
    return torch.cat(outs, 1)


def exactly(case: Case) -> torch.Tensor:
    q, k, v = (x.double().cpu() for x in inputs(case))
    words = {name: x.double().cpu() if isinstance(x, torch.Tensor) else x for name, x in keywords(case).items()}
    mask = case.mask
    known = mask.seq_len
    if known is not None:  # a mask of a longer sequence: the rest of it is never seen
        q, k, v = (torch.cat([x, x.new_zeros(len(x), known - TOKENS, *x.shape[2:])], 1) for x in (q, k, v))
    cp = df.ContextParallel(df.transport.Alone(), kernel=df.kernels.Reference())
    return df.attention(q, k, v, cp=cp, **words)[:, :TOKENS]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chunks_and_steps_are_exact(case, ranks):
    outs = Simulator(ranks, "cuda").run(lambda t: through(case, df.ContextParallel(t, kernel=case.kernel)))
    assert all(torch.equal(out, outs[0]) for out in outs)
    right = exactly(case)
    error = (outs[0].double().cpu() - right).norm() / right.norm()
    assert error < BARS[case.dtype]
    if case.dtype != torch.float32:
        rounding = (right.to(case.dtype).double() - right).norm() / right.norm()
        assert error < 2 * rounding  # P is rounded too in a chunk


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[1]], ids=lambda case: case.name)
def test_a_captured_step_is_replayed_while_the_cache_grows(case):
    q, k, v = inputs(case)
    sizes = dict(batch=case.batch, kv_heads=case.kv_heads, d_qk=case.d_qk, d_v=case.d_v, capacity=TOKENS)
    cp = df.ContextParallel(df.transport.Alone())
    eager, graphed = (df.Cache(cp, **sizes, dtype=case.dtype, device="cuda") for _ in range(2))
    prompt = [x[:, :300] for x in (q, k, v)]
    words = keywords(case)
    for cache in (eager, graphed):
        df.attention(*prompt, cp=cp, cache=cache, **words)
    new = [x[:, 300:301].clone() for x in (q, k, v)]
    df.decode(*new, cache=graphed, **words)
    graphed.truncate(300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = df.decode(*new, cache=graphed, **words)
    assert graphed.length == 300
    for at in range(300, 360):
        for static, x in zip(new, (q, k, v), strict=True):
            static.copy_(x[:, at : at + 1])
        graph.replay()
        expected = df.decode(*(x[:, at : at + 1] for x in (q, k, v)), cache=eager, **words)
        assert torch.equal(out, expected), at
    assert graphed.length == 360
    graphed.truncate(350)
    after = [x[:, 350:400] for x in (q, k, v)]
    eager.truncate(350)
    chunks = [df.attention(*after, cp=cp, cache=cache, **words) for cache in (eager, graphed)]
    assert torch.equal(*chunks)


def part(case: Case) -> torch.Tensor:
    """Runs as a rank."""
    return through(case, df.ContextParallel(dist.group.WORLD)).cpu()


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[1]], ids=lambda case: case.name)
def test_over_nccl(case: Case, ranks: Ranks):
    outs = ranks.run(part, case)
    assert all(torch.equal(out, outs[0]) for out in outs)
    right = exactly(case)
    rounding = (right.to(case.dtype).double() - right).norm()
    assert (outs[0].double() - right).norm() < 2 * rounding


def replayed(case: Case) -> list[torch.Tensor]:
    """Runs as a rank: steps that are replayed, and the same ones made one by one."""
    q, k, v = inputs(case)
    cp = df.ContextParallel(dist.group.WORLD)
    words = keywords(case)
    sizes = dict(batch=case.batch, kv_heads=case.kv_heads, d_qk=case.d_qk, d_v=case.d_v, capacity=TOKENS)
    eager, graphed = (df.Cache(cp, **sizes, dtype=case.dtype) for _ in range(2))
    new = [x[:, :1].clone() for x in (q, k, v)]
    df.decode(*new, cache=graphed, **words)
    graphed.truncate(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = df.decode(*new, cache=graphed, **words)
    pairs = []
    for at in range(20):
        for static, x in zip(new, (q, k, v), strict=True):
            static.copy_(x[:, at : at + 1])
        graph.replay()
        pairs.append(torch.stack([out, df.decode(*new, cache=eager, **words)]).cpu())
    assert graphed.lengths == eager.lengths
    return pairs


def test_a_step_over_nccl_is_replayed(ranks: Ranks):
    for pairs in ranks.run(replayed, CASES[1]):
        for captured, eager in pairs:
            assert torch.equal(captured, eager)


def test_a_captured_step_beyond_the_room_is_told():
    cp = df.ContextParallel(df.transport.Alone())
    cache = df.Cache(cp, batch=1, kv_heads=1, d_qk=64, capacity=4, dtype=torch.bfloat16, device="cuda")
    new = [torch.randn(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    df.decode(*new, cache=cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = df.decode(*new, cache=cache)
    for _ in range(3):
        graph.replay()
        assert not out.isnan().any()
    graph.replay()
    assert out.isnan().all()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="ran out of room"):
        df.decode(*new, cache=cache)
    assert cache.length == 4
    cache.truncate(2)
    assert not df.decode(*new, cache=cache).isnan().any()


def test_ranks_with_different_tokens_are_told():
    def work(transport):
        cp = df.ContextParallel(transport, check_every_call=False)
        cache = df.Cache(cp, batch=1, kv_heads=1, d_qk=64, capacity=64, dtype=torch.bfloat16, device="cuda")
        same, other = (torch.full((1, 1, 1, 64), x, device="cuda", dtype=torch.bfloat16) for x in (1.0, 2.0))
        df.decode(same, same, same, cache=cache)
        out = df.decode(other if transport.rank else same, same, same, cache=cache)
        torch.cuda.synchronize()  # the host says so two steps later, on all ranks before the same one
        assert df.decode(same, same, same, cache=cache).isnan().all()
        with pytest.raises(ValueError, match="ranks have different tokens"):
            df.decode(same, same, same, cache=cache)
        return out.isnan().all().item(), cache.length, df.decode(same, same, same, cache=cache).isnan().any().item()

    assert Simulator(2, "cuda").run(work) == [(True, 1, False)] * 2
