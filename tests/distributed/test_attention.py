"""Exactness over real processes: forward, lse and all gradients against dense float64."""

import pytest
import torch
import torch.distributed as dist

import distflash as df
from distflash.kernels import Reference
from distflash.overlap import overlap
from tests.dense import (
    Problem,
    assert_exact,
    assert_largest,
    assert_no_less_exact,
    in_dtype,
    join,
    make_inputs,
    on_rank,
    options,
)
from tests.oracle import Blind
from tests.poison import poison_memory
from tests.ranks import as_near

# Lengths that no number of ranks divides.
PROBLEMS = {
    "causal": Problem(df.Causal(), 61, batch=2, heads=4, kv_heads=2),
    "full, all options": Problem(df.Full(), 45, heads=4, d_v=5, softcap=2.0, alibi=True, sinks=True, scale=0.7),
    "window": Problem(df.Window(9, 3), 61, heads=3),
    "causal documents": Problem(df.Causal() & df.Documents([0, 7, 8, 33, 47]), 47),
    "prefix": Problem(df.PrefixLM(20), 50, sinks=True),
    "union of three": Problem(
        df.Window(5, 0) | df.PrefixLM(3) & df.Chunked(9) | Blind(11, 30), 47, heads=4, sinks=True
    ),
    "rows that see nothing": Problem(Blind(11, 30), 47, alibi=True),
    "more ranks than tokens": Problem(df.Causal(), 2, sinks=True),
    "dropout": Problem(df.Causal() | df.Chunked(20), 47, batch=2, heads=4, kv_heads=2, sinks=True, dropout_p=0.3),
}
LAYOUTS = [df.Contiguous(), df.Zigzag(), df.Striped(), df.Balanced(df.Causal() & df.Chunked(13), chunk=4)]


def part(p, layout, group=None, schedule=None):
    """Runs as a rank: its part of a problem."""
    poison_memory()
    group = dist.group.WORLD if group is None else group
    cp = df.ContextParallel(group, layout, schedule or df.Ring(), Reference())
    return on_rank(p, make_inputs(p), cp)


SCHEDULES = [
    (2, df.PassQuery()),
    (3, df.PassQuery()),
    (3, df.DoubleRing(1)),
    (4, df.PassQuery()),
    (4, df.DoubleRing(2)),
]


@pytest.mark.covering(
    1,
    name=["full, all options", "causal documents", "union of three", "more ranks than tokens", "dropout"],
    on=SCHEDULES,
)
def test_exact_by_other_schedules(on, name, ranks_of):
    world_size, schedule = on
    ranks, p, layout = ranks_of(world_size), PROBLEMS[name], df.Zigzag()
    assert_exact(p, make_inputs(p), join(ranks.run(part, p, layout, None, schedule), layout, p.seq_len))
    p = in_dtype(p, torch.bfloat16)
    parts = ranks.run(part, p, layout, None, schedule)
    assert_no_less_exact(p, make_inputs(p), join(parts, layout, p.seq_len), alone(p))


def alone(p):
    return on_rank(p, make_inputs(p), df.ContextParallel(df.transport.Alone(), kernel=Reference()))


# Simulated ranks have all of them.
@pytest.mark.covering(2, world_size=[1, 2, 3, 4], layout=LAYOUTS, name=list(PROBLEMS))
def test_exact(world_size, layout, name, ranks_of):
    """In float64 to its rounding; in float32 and bfloat16 no less exact than one rank."""
    ranks, p = ranks_of(world_size), PROBLEMS[name]
    assert_exact(p, make_inputs(p), join(ranks.run(part, p, layout), layout, p.seq_len))
    for dtype in (torch.float32, torch.bfloat16):
        p = in_dtype(p, dtype)
        assert_no_less_exact(p, make_inputs(p), join(ranks.run(part, p, layout), layout, p.seq_len), alone(p))


def largest_scores(p, dtype):
    """Runs as a rank: the largest score of each head."""
    poison_memory()
    p = in_dtype(p, dtype)
    x, cp = make_inputs(p), df.ContextParallel(dist.group.WORLD)
    shards = map(cp.shard, (x.q, x.k, x.v))
    more = dict(alibi_slopes=x.slopes, sinks=x.sinks, return_max_logits=True)
    return df.attention(*shards, cp=cp, **more, **options(p))[1]


@pytest.mark.parametrize("name", ["full, all options", "union of three", "more ranks than tokens"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_largest_scores_are_those_of_all_ranks(world_size, name, ranks_of):
    p = PROBLEMS[name]
    for dtype in (torch.float64, torch.bfloat16):
        x = make_inputs(in_dtype(p, dtype))
        found = ranks_of(world_size).run(largest_scores, p, dtype)
        assert all(torch.equal(each, found[0]) for each in found)
        assert_largest(in_dtype(p, dtype), x, found[0])


def part_that_holds_heads_back(p, layout):
    """Runs as a rank: its part, as between ranks of one host, and whether heads were held back in its plans."""
    poison_memory()
    kernel = df.kernels.Reference()
    cp = df.ContextParallel(as_near(), layout, kernel=kernel)
    plan = overlap(
        cp.plan(p.mask, p.seq_len), p.kv_heads, p.batch, kernel.abilities(torch.device("cpu")), intra_node=True
    )
    stages = plan.forward, plan.backward
    held_back = [any(each.heads for stage in s for each in stage.passes) for s in stages]
    return on_rank(p, make_inputs(p), cp), held_back


@pytest.mark.covering(2, mask=[df.Full(), df.Causal(), df.Window(9, 0)], layout=LAYOUTS, world_size=[2, 3, 4])
def test_exact_where_heads_are_held_back(world_size, layout, mask, ranks_of):
    p = Problem(mask, 61, batch=2, heads=8, kv_heads=8, dropout_p=0.2)
    parts, held_back = zip(*ranks_of(world_size).run(part_that_holds_heads_back, p, layout), strict=True)
    assert_exact(p, make_inputs(p), join(parts, layout, p.seq_len))
    if mask == df.Full():
        assert list(held_back) == [[True, world_size == 2]] * world_size


def part_in_a_ring_of_two(problems):
    """Runs as one of four ranks: two rings of two, side by side, each with a problem of its own."""
    rings = [dist.new_group(members) for members in ([0, 2], [3, 1])]
    mine = dist.get_rank() % 2
    return part(problems[mine], df.Zigzag(), rings[mine])


def test_rings_of_two_in_a_world_of_four(ranks_of):
    problems = [PROBLEMS["causal"], PROBLEMS["full, all options"]]
    parts = ranks_of(4).run(part_in_a_ring_of_two, problems)
    # torch numbers the members of a group in ascending order unless told otherwise.
    for p, members in zip(problems, ([0, 2], [1, 3]), strict=True):
        assert_exact(p, make_inputs(p), join([parts[r] for r in members], df.Zigzag(), p.seq_len))


def different_calls(changes):
    """Runs as a rank: a call that is the same on every rank, but for the changes on rank 1; what it is told."""
    cp = df.ContextParallel(dist.group.WORLD)
    options = {"mask": df.Causal(), "tokens": 4, "heads": 2, "dtype": torch.float32}
    options |= changes if cp.rank == 1 else {}
    tokens, heads, dtype = (options.pop(name) for name in ("tokens", "heads", "dtype"))
    q, k = (torch.zeros(1, tokens, h, 8, dtype=dtype) for h in (heads, 2))
    with pytest.raises(ValueError) as caught:
        df.attention(q, k, k, cp=cp, **options)
    # The group is in order afterwards: a good call goes through.
    good = torch.zeros(1, 4, 2, 8)
    assert torch.equal(df.attention(good, good, good, cp=cp), good)
    return str(caught.value)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(mask=df.Window(3)), "mask differs between ranks 0, 2 and rank 1"),
        (dict(heads=4), "heads is 2 on rank 0, 4 on rank 1, 2 on rank 2"),
        (dict(dtype=torch.bfloat16), "dtype differs between ranks 0, 2 and rank 1"),
        (dict(tokens=5), "seq_len is 12 on rank 0, 15 on rank 1, 12 on rank 2"),
    ],
    ids=str,
)
def test_a_disagreement_is_named_on_every_rank(changes, words, ranks_of):
    for text in ranks_of(3).run(different_calls, changes):
        assert words in text


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(heads=3), "q, k: 3 query heads are not a multiple of 2"),
        (dict(softcap=-1.0), "softcap: expected a positive number"),
        (dict(dropout_p=0.5), "dropout_seed: is missing"),
    ],
    ids=str,
)
def test_a_rank_that_refuses_its_own_arguments_stops_the_others(changes, words, ranks_of):
    texts = ranks_of(3).run(different_calls, changes)
    assert words in texts[1]
    assert all("rank 1 refused this call" in texts[rank] for rank in (0, 2))


def compiled_and_eager():
    """Runs as a rank: `SelfAttention` compiled without a graph break, and as it is; outputs and gradients."""
    torch.manual_seed(0)
    cp = df.ContextParallel(dist.group.WORLD)
    module = df.nn.SelfAttention(16, heads=4, kv_heads=2, cp=cp).double()
    x = cp.shard(torch.randn(1, 12, 16, dtype=torch.float64))

    def gradients(forward):
        module.zero_grad()
        out = forward(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in module.parameters())]

    return gradients(torch.compile(module, fullgraph=True, backend="aot_eager")), gradients(module)


def test_a_compiled_module_is_the_eager_one(ranks_of):
    for compiled, eager in ranks_of(2).run(compiled_and_eager):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
