"""The ring over NCCL against one rank and dense float64."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import distflash as df
from distflash.schedules import Schedule
from tests import dense
from tests.dense import Problem, Results
from tests.gpu import problems
from tests.ranks import RankError, Ranks, as_near

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
LAYOUTS = [df.Zigzag(), df.Contiguous(), df.Striped()]


def device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def ring_part(p: Problem, layout: df.Layout) -> Results:
    """Runs as a rank: its part of a problem."""
    cp = df.ContextParallel(dist.group.WORLD, layout=layout)
    return problems.to_cpu(dense.on_rank(p, problems.on(dense.make_inputs(p), device()), cp))


def alone(p: Problem) -> Results:
    """Runs as a rank: the same kernel without a ring."""
    return problems.to_cpu(dense.on_rank(p, problems.on(dense.make_inputs(p), device()), None))


def assert_no_less_exact(p: Problem, got: Results, single: Results) -> None:
    """Error against float64 at most 1.1 times that of one rank, and a few units of float32 for luck."""
    x = dense.make_inputs(p)
    errors, bars = dense.relative_errors(p, x, got), dense.relative_errors(p, x, single)
    for name, error in errors.items():
        # A sink's gradient is one number a head: too few to compare errors by their size.
        luck = problems.BARS[p.dtype] if name == "dsinks" else 16 * torch.finfo(torch.float32).eps
        assert error <= 1.1 * bars[name] + luck, f"{name}: error {error:.3e}, on one rank {bars[name]:.3e}"


# bfloat16 with all layouts and masks; the rest of the dtypes where they differ: in what is sent.
CASES = [(name, layout, torch.bfloat16) for name in problems.PROBLEMS for layout in LAYOUTS]
CASES += [(name, df.Zigzag(), torch.float32) for name in ("causal", "everything")]
CASES += [("causal", df.Zigzag(), torch.float16)]


@pytest.mark.parametrize(("name", "layout", "dtype"), CASES, ids=problems.name_of)
def test_no_less_exact_than_one_rank(name: str, layout: df.Layout, dtype: torch.dtype, ranks: Ranks) -> None:
    p = dense.in_dtype(problems.PROBLEMS[name], dtype)
    parts = ranks.run(ring_part, p, layout)
    single = ranks.run(alone, p)[0]
    assert_no_less_exact(p, dense.join(parts, layout, p.seq_len), single)


SCHEDULES = [df.AllGather(), df.Ulysses(), df.DoubleRing(), df.PassQuery()]


def part_by(p: Problem, schedule: Schedule, near: bool) -> Results:
    """Runs as a rank: its part by another schedule, among ranks that seem near to one another or far."""
    cp = df.ContextParallel(as_near() if near else dist.group.WORLD, schedule=schedule)
    return problems.to_cpu(dense.on_rank(p, problems.on(dense.make_inputs(p), device()), cp))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", ["causal", "everything"])
@pytest.mark.parametrize("near", [False, True])
def test_other_schedules(near: bool, name: str, schedule: Schedule, ranks: Ranks) -> None:
    p = dense.in_dtype(problems.PROBLEMS[name], torch.bfloat16)
    parts = ranks.run(part_by, p, schedule, near)
    single = ranks.run(alone, p)[0]
    assert_no_less_exact(p, dense.join(parts, df.Zigzag(), p.seq_len), single)


REPRODUCIBLE = df.Reproducible(96)
WHOLE_CHUNKS = df.WholeChunks(df.Zigzag(), 96)


def reproducible_part(p: Problem) -> Results:
    """Runs as a rank: its part in fixed chunks."""
    cp = df.ContextParallel(dist.group.WORLD, WHOLE_CHUNKS, REPRODUCIBLE)
    return problems.to_cpu(dense.on_rank(p, problems.on(dense.make_inputs(p), device()), cp))


def reproducible_alone(p: Problem) -> Results:
    """Runs as a rank: the whole problem in fixed chunks."""
    cp = df.ContextParallel(df.transport.Alone(device=device()), schedule=REPRODUCIBLE)
    return problems.to_cpu(dense.on_rank(p, problems.on(dense.make_inputs(p), device()), cp))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=problems.name_of)
@pytest.mark.parametrize("name", ["causal", "window and first keys", "everything"])
def test_reproducible_bits_are_those_of_one_rank(name: str, dtype: torch.dtype, ranks: Ranks) -> None:
    p = dense.in_dtype(problems.PROBLEMS[name], dtype)
    got = dense.join(ranks.run(reproducible_part, p), WHOLE_CHUNKS, p.seq_len)
    for single in ranks.run(reproducible_alone, p):
        assert all(torch.equal(got[of], single[of]) for of in single)


def of_one_program(p: Problem, ranks: int, where: torch.device) -> df.kernels.Hopper:
    """A kernel for which a rank's few keys are enough to hold some heads back."""
    kernel = df.kernels.Hopper(margin=torch.cuda.get_device_properties(where).multi_processor_count - 1)
    assert p.seq_len // ranks * p.kv_heads // 4 > kernel.abilities(where).smallest_work
    return kernel


def held_back_part(p: Problem, layout: df.Layout) -> Results:
    """Runs as a rank: the part by such a kernel."""
    kernel = of_one_program(p, dist.get_world_size(), device())
    cp = df.ContextParallel(as_near(), layout=layout, kernel=kernel)
    return problems.to_cpu(dense.on_rank(p, problems.on(dense.make_inputs(p), device()), cp))


@pytest.mark.skipif(not on_hopper, reason="no GPU of compute capability 9.0 here")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("kv_heads", [4, 8])
def test_heads_that_are_held_back_for_the_way_home(layout: df.Layout, kv_heads: int, ranks: Ranks) -> None:
    p = Problem(seq_len=450 * ranks.count + 1, heads=8, kv_heads=kv_heads, d_qk=64, d_v=64, dtype=torch.bfloat16)
    parts = ranks.run(held_back_part, p, layout)
    single = ranks.run(alone, p)[0]
    assert_no_less_exact(p, dense.join(parts, layout, p.seq_len), single)


MASKS = {
    "causal": lambda n: df.Causal(),
    "documents": lambda n: df.Causal() & df.Documents([0, n // 11, n // 10, n // 3, n // 2 + 7, n]),
    "window": lambda n: df.Window(200, 0),
}


@pytest.mark.skipif(not on_hopper, reason="no GPU of compute capability 9.0 here")
@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize("mask", MASKS)
def test_nothing_is_lost_where_heads_are_held_back(mask: str, layout: df.Layout, world_size: int) -> None:
    """Parts of dK and dV that come home early are not overwritten by the heads that are computed last."""
    n = 450 * world_size + 1
    p = Problem(MASKS[mask](n), seq_len=n, heads=8, kv_heads=8, d_qk=64, d_v=64, dtype=torch.bfloat16)
    x, kernel = problems.on(dense.make_inputs(p), "cuda"), of_one_program(p, world_size, torch.device("cuda"))

    def part(transport: df.transport.SimulatedTransport) -> Results:
        with torch.autograd.set_multithreading_enabled(False):  # or one thread would run the backward of all
            return problems.to_cpu(dense.on_rank(p, x, df.ContextParallel(transport, layout, kernel=kernel)))

    parts = df.transport.Simulator(world_size).run(part)
    assert_no_less_exact(p, dense.join(parts, layout, p.seq_len), problems.to_cpu(dense.on_rank(p, x, None)))


@pytest.mark.skipif(not on_hopper, reason="no GPU of compute capability 9.0 here")
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize(("kv_heads", "d_qk", "d_v"), [(4, 64, 64), (8, 128, 128), (4, 192, 128), (4, 256, 256)])
def test_two_ranks_of_one_gpu(layout: df.Layout, kv_heads: int, d_qk: int, d_v: int) -> None:
    """The same order of work, and all its kernels, by simulated ranks."""
    p = Problem(seq_len=901, heads=8, kv_heads=kv_heads, d_qk=d_qk, d_v=d_v, dtype=torch.bfloat16)
    x, kernel = problems.on(dense.make_inputs(p), "cuda"), of_one_program(p, 2, torch.device("cuda"))

    def part(transport: df.transport.SimulatedTransport) -> Results:
        return problems.to_cpu(dense.on_rank(p, x, df.ContextParallel(transport, layout, kernel=kernel)))

    parts = df.transport.Simulator(2).run(part)
    assert_no_less_exact(p, dense.join(parts, layout, p.seq_len), problems.to_cpu(dense.on_rank(p, x, None)))


def assert_as_exact_as_one_rank(got: Results, single: Results, truth: Results) -> None:
    """Errors against the same attention in float32, where a dense matrix would not fit."""
    for name in ("out", "dq", "dk", "dv"):
        error, bar = ((x[name].double() - truth[name].double()).norm() for x in (got, single))
        assert error <= 1.1 * bar, f"{name}: error {error:.3e}, on one rank {bar:.3e}"


@pytest.mark.parametrize("mask", [df.Causal(), df.Window(4095, 0)], ids=repr)
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
@pytest.mark.parametrize(("d_qk", "d_v"), [(64, 64), (192, 128), (256, 256)])
def test_sixteen_thousand_tokens_a_rank(d_qk: int, d_v: int, layout: df.Layout, mask: df.Mask) -> None:
    """Simulated ranks of one GPU; tensors end where a page of memory does."""
    p = Problem(mask, seq_len=2**15, heads=4, kv_heads=2, d_qk=d_qk, d_v=d_v, dtype=torch.bfloat16)
    x = problems.on(dense.make_inputs(p), "cuda")

    def part(transport: df.transport.SimulatedTransport) -> Results:
        with torch.autograd.set_multithreading_enabled(False):  # or one thread would run the backward of both
            return problems.to_cpu(dense.on_rank(p, x, df.ContextParallel(transport, layout)))

    got = dense.join(df.transport.Simulator(2).run(part), layout, p.seq_len)
    wide = replace(x, q=x.q.float(), k=x.k.float(), v=x.v.float(), dout=x.dout.float())
    truth = dense.on_rank(replace(p, dtype=torch.float32), wide, df.ContextParallel(df.transport.Alone()))
    single = dense.on_rank(p, x, df.ContextParallel(df.transport.Alone()))
    assert_as_exact_as_one_rank(got, problems.to_cpu(single), problems.to_cpu(truth))


def test_one_device_mesh_dimension_is_a_group(ranks: Ranks) -> None:
    assert set(ranks.run(mesh_world_size)) == {ranks.count}


def mesh_world_size() -> int:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device().type, (dist.get_world_size(),), mesh_dim_names=("context",))
    return df.ContextParallel(mesh["context"]).world_size


def disagree() -> str:
    """Runs as a rank: rank 0 has another mask. Returns what it is told."""
    cp = df.ContextParallel(dist.group.WORLD)
    mask = df.Full() if cp.rank == 0 else df.Causal()
    q = torch.randn(1, 64, 2, 64, device=device(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="disagree") as caught:
        df.attention(q, q, q, mask=mask, cp=cp)
    return str(caught.value)


def test_disagreement_is_told_to_every_rank(ranks: Ranks) -> None:
    for message in ranks.run(disagree):
        assert "mask" in message and "rank" in message


def refuse() -> str:
    """Runs as a rank: rank 0's own arguments are wrong before anything has been agreed on."""
    cp = df.ContextParallel(dist.group.WORLD)
    q = torch.randn(1, 64, 3 if cp.rank == 0 else 2, 64, device=device(), dtype=torch.bfloat16)
    k = torch.randn(1, 64, 2, 64, device=device(), dtype=torch.bfloat16)
    with pytest.raises(ValueError) as caught:
        df.attention(q, k, k, mask=df.Causal(), cp=cp)
    return str(caught.value)


def test_a_refusal_reaches_every_rank(ranks: Ranks) -> None:
    first, *others = ranks.run(refuse)
    assert "3 query heads" in first
    assert all("rank 0" in message for message in others)


def exchanges(mask: df.Mask, seq_len: int) -> int:
    return df.ContextParallel(dist.group.WORLD, layout=df.Contiguous()).plan(mask, seq_len).exchanges


def test_only_exchanges_that_are_needed_are_made(ranks: Ranks) -> None:
    n = ranks.count
    assert ranks.run(exchanges, df.Full(), 64 * n) == [n - 1] * n
    assert ranks.run(exchanges, df.Window(15, 0), 64 * n) == [1] * n
    assert ranks.run(exchanges, df.Documents(range(0, 64 * n + 1, 64)), 64 * n) == [0] * n


def test_a_rank_that_raises_is_named(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1: (.|\n)*one over nothing"):
        ranks.run(fail_on_rank_1)
    assert ranks.run(dist.get_rank) == list(range(ranks.count))


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("one over nothing")


def sync_free() -> None:
    """Runs as a rank: a call of a known signature does not make the host wait."""
    cp = df.ContextParallel(dist.group.WORLD)
    q = torch.randn(1, 256, 2, 64, device=device(), dtype=torch.bfloat16, requires_grad=True)
    for warm in (False, True):
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            out = df.attention(q, q, q, mask=df.Causal(), cp=cp)
            out.backward(torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_warm_call_waits_for_nothing(ranks: Ranks) -> None:
    ranks.run(sync_free)


def test_shards_of_unequal_length(ranks: Ranks) -> None:
    """Uneven shards: one token more than divides."""
    p = replace(problems.PROBLEMS["causal"], seq_len=64 * ranks.count + 1, dtype=torch.bfloat16)
    parts = ranks.run(ring_part, p, df.Zigzag())
    lengths = {part["out"].shape[1] for part in parts}
    assert len(lengths) > 1
    single = ranks.run(alone, p)[0]
    assert_no_less_exact(p, dense.join(parts, df.Zigzag(), p.seq_len), single)
