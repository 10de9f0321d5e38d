"""Counts, plots and comparisons of benchmarks; candidates with wrong results get no figure."""

import os
from itertools import accumulate, pairwise

import pytest
import torch

import distflash as df
from benchmarks import common, gpt2, kernels, masks, ring
from benchmarks.common import Shape
from benchmarks.comparison import (
    BACKWARD,
    BOTH,
    FORWARD,
    Candidate,
    Comparison,
    Passes,
    error_line,
    ours,
    reference_for,
)
from benchmarks.workloads import MASKS, balance, document_lengths
from distflash.geometry import Geometry, Needs

ALONE = df.ContextParallel(df.transport.Alone())
SHAPE = Shape(1, 96, 4, 2, 16, 16)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("seq_len", [2, 300, 1024])
def test_pairs_are_those_of_the_dense_mask(name, seq_len):
    mask, positions = MASKS[name](seq_len), torch.arange(seq_len)
    assert common.pairs_of(mask, seq_len) == mask.materialize(positions, positions, seq_len).sum()


def test_masks_at_their_full_size():
    S = 131072
    assert common.pairs_of(MASKS["causal"](S), S) == S * (S + 1) // 2
    assert common.pairs_of(MASKS["window4096"](S), S) == 4096 * 4097 // 2 + (S - 4096) * 4096
    lengths = document_lengths(S)
    assert common.pairs_of(MASKS["documents"](S), S) == sum(n * (n + 1) // 2 for n in lengths)


def test_flops_of_backward_are_two_and_a_half_times_those_of_forward():
    work = common.flops(Shape(2, 100, 3, 1, 64, 64), pairs=10)
    assert work == {"forward": 2 * 3 * 10 * 4 * 64, "backward": 2 * 3 * 10 * 10 * 64}
    work = common.flops(Shape(1, 100, 1, 1, 192, 128), pairs=1)
    assert work == {"forward": 2 * (192 + 128), "backward": 2 * (3 * 192 + 2 * 128)}


def test_document_lengths_are_log_uniform_and_seeded():
    lengths = document_lengths(2**24)
    assert sum(lengths) == 2**24 and lengths == document_lengths(2**24) != document_lengths(2**24, seed=1)
    whole = torch.tensor(lengths[:-1])
    assert whole.min() >= 256 and whole.max() <= 32768
    # As many in each factor of two from 256 to 32K: seven bins, each within 4 standard deviations of n / 7.
    counts = torch.histc((whole / 256).log2(), bins=7, min=0, max=7)
    n = len(whole)
    assert n > 2000 and ((counts - n / 7).abs() < 4 * (n / 7 * 6 / 7) ** 0.5).all()


def test_documents_of_a_short_sequence_are_shorter():
    mask = MASKS["documents"](512)
    assert mask.seq_len == 512 and len(mask.second.cu_seqlens) > 3


def test_blocks_count_from_the_start_of_each_document():
    S = 65536
    documents, blocks = (MASKS["blocks"](S).first, MASKS["blocks"](S).second)
    assert documents.seq_len == blocks.seq_len == S and len(documents.cu_seqlens) > 4
    assert set(documents.cu_seqlens) <= set(blocks.size_or_boundaries)
    for start, stop in pairwise(documents.cu_seqlens):
        assert stop - start >= 4096 or stop == S
        inside = [end for end in blocks.size_or_boundaries if start <= end < stop]
        assert inside == list(range(start, stop, 4096))
    # A document of n whole blocks and a rest: each block sees itself and those before it.
    lengths = [[4096] * (n // 4096) + [n % 4096] for n in torch.tensor(documents.cu_seqlens).diff().tolist()]
    expected = sum(length * sum(own[: n + 1]) for own in lengths for n, length in enumerate(own))
    assert common.pairs_of(MASKS["blocks"](S), S) == expected


def test_balance_is_the_most_work_over_the_mean():
    assert balance(torch.tensor([[3, 1], [2, 2]])) == 1
    assert balance(torch.tensor([[6, 0], [1, 1]])) == 1.5
    mask = df.Causal() & df.Documents([0, *accumulate(document_lengths(4096, 0, 64, 1024))])
    counts = Needs.of(Geometry.of_sequence(mask, df.Contiguous(), 4096, 4)).pairs
    assert balance(counts) == pytest.approx(float(counts.sum(1).max() / counts.sum() * 4))


def comparison(passes=(FORWARD, BACKWARD)):
    return Comparison(common.Clock(CPU, seconds=0.001), torch.float32, passes)


@pytest.fixture(scope="module")
def problem():
    inputs = common.random_inputs(SHAPE, SHAPE.S, torch.float32, CPU)
    return inputs, reference_for(inputs, df.Causal(), ALONE, SHAPE.S)


def test_ours_is_right_and_timed(problem):
    inputs, right = problem
    held = comparison((FORWARD, BACKWARD, BOTH))
    assert held.enter("distflash", lambda: ours(ALONE, SHAPE.S).run(inputs, df.Causal()), right)
    row = held.row(lambda name, which: 3e12)
    assert set(row["tflops"]) == {f"distflash|{which}" for which in (FORWARD, BACKWARD, BOTH)}
    for key, rate in row["tflops"].items():
        assert rate == pytest.approx(3 / row["timings"][key]["seconds"])
    assert not row["left_out"] and max(row["errors"]["distflash"].values()) < 1e-5


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_a_wrong_result_has_no_figure(problem, name):
    inputs, right = problem
    passes = ours(ALONE, SHAPE.S).run(inputs, df.Causal())
    for wrong in (1.01 * passes.results[name], torch.full_like(passes.results[name], torch.nan)):
        held = comparison()
        assert not held.enter("peer", lambda w=wrong: Passes(passes.calls, passes.results | {name: w}), right)
        assert held.left_out == {"peer": "wrong result"}
        assert not held.row(lambda name, which: 1.0)["tflops"]


def test_a_peer_that_raises_is_left_out_with_the_reason(problem):
    def run():
        raise NotImplementedError("no such shape\nand much more")

    held = comparison()
    assert not held.enter("peer", run, problem[1])
    assert held.left_out["peer"].startswith("NotImplementedError: no such shape (test_benchmarks.py:")
    assert error_line(KeyError()) == "KeyError: "


def by_definition(q, k, v, mask):
    """Heads first, as many key heads as query heads."""
    assert q.shape[1] == k.shape[1] == v.shape[1] and all(x.is_contiguous() for x in (q, k, v))
    positions = torch.arange(q.shape[2])
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask.materialize(positions, positions), -torch.inf)
    return s.softmax(-1) @ v


def test_a_candidate_with_other_dimensions_and_without_grouped_heads(problem):
    before = []
    peer = Candidate(by_definition, heads_first=True, repeat_heads=True, before=lambda: before.append(1))
    passes = peer.run(problem[0], df.Causal())
    assert max(problem[1].errors(**passes.results).values()) < 1e-5
    assert passes.results["dk"].shape == problem[0][1].shape and len(before) == 2
    passes.calls[BOTH]()
    assert len(before) == 4


@pytest.mark.parametrize("softmax", [torch.float16, torch.float32])
def test_plain_attention_is_right(softmax):
    shape = Shape(2, 64, 2, 2, 64, 64)
    row = gpt2.measure(shape, torch.float16, softmax, common.Clock(CPU, 0.001))
    assert gpt2.PLAIN in row["errors"] and gpt2.PLAIN not in row["left_out"] and gpt2.OURS not in row["left_out"]
    assert row["speedup"][f"{gpt2.PLAIN}|{BOTH}"] == 1
    with pytest.raises(ValueError, match="Causal masks only"):
        gpt2.plain(softmax).attend(*(torch.zeros(1, 1, 4, 8),) * 3, df.Full())


def test_ratios_and_table_of_kernels():
    tflops = {"distflash|forward": 600.0, "distflash|backward": 500.0, "SDPA cuDNN|forward": 500.0}
    ratios = kernels.ratios(tflops)
    assert ratios == {"SDPA cuDNN|forward": 1.2}
    row = {"shape": "B1 S16384 H16 D128", "mask": "full", "tflops": tflops, "ratios": ratios}
    assert kernels.table([row]).splitlines()[-1] == "| B1 S16384 H16 D128 full | 600 / 500 | 1.200 / - | - / - |"
    assert len(kernels.TABLE) == 8 and {mask for _, mask in kernels.TABLE} == {"full", "causal"}


def test_shares_of_the_ring():
    tflops = {"ring|forward": 570.0, "single|forward": 600.0, "peer|forward": 300.0, "peer|backward": 200.0}
    assert ring.shares(tflops) == {
        "ring|forward": {"of single": 0.95},
        "single|forward": {},
        "peer|forward": {"of single": 0.5, "ring over it": 1.9},
        "peer|backward": {},
    }
    assert ring.single_length("causal", 131072, 4, 131072) == 65536
    assert ring.single_length("documents", 131072, 4, 131072) == 32768
    assert ring.single_length("full", 2**20, 4, 131072) == 131072


def test_shares_of_masks_are_of_the_same_candidates_dense_rate():
    def case(who, mask, ranks):
        return {"name": f"{who}, {mask}, {ranks}", "who": who, "mask": mask, "ranks": ranks}

    cases = [case("a", "causal", 1), case("a", "documents", 1), case("b", "causal", 1), case("b", "documents", 1)]
    cases += [case("a", "causal", 2), case("a", "documents", 2)]
    rates = dict(zip((c["name"] for c in cases), (100.0, 80.0, 200.0, 100.0, 90.0, 60.0), strict=True))
    tflops = {f"{name}|{FORWARD}": rate for name, rate in rates.items()}
    assert masks.shares(cases, tflops) == {
        "a, documents, 1|forward": 0.8,
        "b, documents, 1|forward": 0.5,
        "a, causal, 2|forward": 0.9,
        "a, documents, 2|forward": 0.6,
    }


def test_the_worst_of_several_is_nan_if_any_is():
    assert common.worst([1.0, 3.0, 2.0]) == 3
    for values in ([1.0, float("nan")], [float("nan"), 1.0]):
        assert common.worst(values) != common.worst(values)


def test_the_kernel_that_a_call_takes():
    kernel = kernels.kernel_of(ALONE, common.random_inputs(SHAPE, SHAPE.S, torch.float32, CPU))
    assert isinstance(kernel, df.kernels.Reference)


@pytest.fixture
def two_gpus(monkeypatch):
    """A host that seems to have two GPUs; returns which of them each `set_device` took."""
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("NCCL_HOSTID", "this host")
    return taken


def test_ranks_take_gpus_in_turn_and_share_them_as_hosts_of_their_own(two_gpus):
    assert [common.take_gpu(rank, 2).index for rank in range(2)] == [0, 1]
    assert os.environ["NCCL_HOSTID"] == "this host"
    hosts = []
    for rank in range(4):
        assert common.take_gpu(rank, 4).index == rank % 2
        hosts.append(os.environ["NCCL_HOSTID"])
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3]
    assert [device.index for device in two_gpus] == [0, 1, 0, 1, 0, 1]


def test_nothing_is_timed_on_shared_gpus(two_gpus, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--nproc-per-node: got 3, expected at most 2"):
        common.start("cuda")
    assert common.start("cpu").type == "cpu"
    assert common.start("cuda", timed=False).index == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="expected at most 0"):
        common.start("cuda", timed=False)
