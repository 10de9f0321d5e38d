"""Bad input: a ValueError that names the argument, on every rank, before anything is sent."""

from datetime import timedelta
from math import inf, nan

import pytest
import torch

import distflash as df

S, W = 8, 2


def tensors(**changes):
    """Good arguments of a rank of two, but for the changes."""
    shapes = {"q": (1, S // W, 4, 16), "k": (1, S // W, 2, 16), "v": (1, S // W, 2, 16)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | changes


zeros = torch.zeros
BAD_CALLS = {
    "three dimensions": (dict(q=zeros(4, 4, 16)), "q: expected four dimensions"),
    "no tensor": (dict(k=[1.0]), "k: expected a tensor, got list"),
    "heads before tokens": (
        dict(q=zeros(1, 4, 3, 16), k=zeros(1, 2, 3, 16), v=zeros(1, 2, 3, 16)),
        r"k, v: 2 and 2 local tokens differ from q's 4.*order of dimensions is \[batch, seq_local, heads, head_dim\]",
    ),
    "another batch": (dict(v=zeros(2, 4, 2, 16)), "k, v: batch sizes 1 and 2 differ from q's 1"),
    "heads no multiple of kv_heads": (
        dict(k=zeros(1, 4, 3, 16), v=zeros(1, 4, 3, 16)),
        "q, k: 4 query heads are not a multiple of 3 key/value heads",
    ),
    "fewer heads than kv_heads": (
        dict(k=zeros(1, 4, 8, 16), v=zeros(1, 4, 8, 16)),
        "q, k: 4 query heads are not a multiple of 8",
    ),
    "other heads in v": (dict(v=zeros(1, 4, 4, 16)), "v: 4 heads differ from k's 2"),
    "another head_dim in k": (dict(k=zeros(1, 4, 2, 8)), "k: head_dim 8 differs from q's 16"),
    "no head_dim": (dict(v=zeros(1, 4, 2, 0)), "q, v: head dims 16 and 0"),
    "mixed dtypes": (dict(k=zeros(1, 4, 2, 16).bfloat16()), "k: has dtype torch.bfloat16 but q has torch.float32"),
    "mixed dtypes in v": (dict(v=zeros(1, 4, 2, 16).half()), "v: has dtype torch.float16 but q has torch.float32"),
    "mixed devices": (dict(v=zeros(1, 4, 2, 16, device="meta")), "v: is on meta but q is on cpu"),
    "whole numbers": (
        {name: t.int() for name, t in tensors().items()},
        "no kernel supports this call.*dtype torch.int32 is not a floating-point dtype",
    ),
    "mask as a string": (dict(mask="causal"), "mask: expected a Mask such as .*'causal'; objects, not strings"),
    "mask as a class": (dict(mask=df.Causal), r"mask: expected a Mask .*not the class: Causal\(\)"),
    "sinks of the wrong length": (dict(sinks=zeros(2)), r"sinks: expected shape \[4\], one per query head, got \[2\]"),
    "sinks as ints": (dict(sinks=zeros(4).int()), r"sinks: expected a floating-point tensor \[heads\]"),
    "sinks elsewhere": (dict(sinks=zeros(4, device="meta")), "sinks: is on meta but q is on cpu"),
    "slopes of the wrong length": (dict(alibi_slopes=zeros(1)), r"alibi_slopes: expected shape \[4\]"),
    "slopes that want a gradient": (dict(alibi_slopes=zeros(4).requires_grad_()), "alibi_slopes: requires a gradient"),
    "slopes as a list": (dict(alibi_slopes=[0.5] * 4), "alibi_slopes: expected a floating-point tensor"),
    "negative softcap": (dict(softcap=-1.0), "softcap: expected a positive number, or None for none, got -1.0"),
    "dropout out of range": (dict(dropout_p=1.5), "dropout_p: expected a probability"),
    "dropout": (dict(dropout_p=0.5), "no kernel supports this call.*dropout_p=0.5 is not supported"),
    "another length": (dict(seq_len=16), r"q: 4 local tokens, but Zigzag\(\) gives rank \d of 2 \d+ of seq_len=16"),
    "seq_len as a float": (dict(seq_len=8.0), "seq_len: expected the global length, an int, got 8.0"),
    "documents of another length": (
        dict(mask=df.Documents([0, 3, 9]), seq_len=8),
        "mask: cu_seqlens end at 9 but seq_len is 8; they must end at S",
    ),
    "documents of another length than held": (dict(mask=df.Documents([0, 3, 12])), "q: 4 local tokens, but .* gives"),
    "scale of 0": (dict(scale=0.0), "scale: expected a finite number other than 0"),
    "scale of NaN": (dict(scale=float("nan")), "scale: expected a finite number other than 0"),
    "infinite softcap": (dict(softcap=float("inf")), "softcap: expected a positive number"),
}


@pytest.mark.parametrize(("changes", "words"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls_are_refused_on_every_rank_before_anything_is_sent(changes, words):
    simulator = df.transport.Simulator(W)

    def work(transport):
        with pytest.raises(ValueError, match=words):
            df.attention(**tensors(**changes), cp=df.ContextParallel(transport))

    simulator.run(work)
    assert simulator.traffic.messages == 0


@pytest.mark.parametrize("name", [name for name, (changes, _) in BAD_CALLS.items() if "length than" not in name])
def test_the_same_on_one_device(name):
    changes, words = BAD_CALLS[name]
    words = words.replace("of 2", "of 1").replace("Zigzag", r"\w+")
    changes = {"seq_len": S // W} | changes if "another length" in name or "two lengths" in name else changes
    with pytest.raises(ValueError, match=words):
        df.attention(**tensors(**changes))


def test_good_arguments_are_not_refused():
    assert df.attention(**tensors()).shape == (1, 4, 4, 16)


class Picky(df.kernels.Reference):
    def not_supported_reasons(self, problem):
        return ["the moon is full", f"{problem.heads} heads are too many"]


def test_a_kernel_asked_for_is_refused_with_all_reasons():
    cp = df.ContextParallel(df.transport.Alone(), kernel=Picky())
    with pytest.raises(
        ValueError, match=r"kernel: Picky.*does not support this call: the moon is full; 4 heads are too"
    ):
        df.attention(**tensors(), cp=cp)


ALONE = df.transport.Alone()
BAD_GROUPS = {
    "layout as a string": (dict(layout="zigzag"), "layout: expected a Layout such as .*'zigzag'; objects, not strings"),
    "layout as a class": (dict(layout=df.Zigzag), r"layout: .*not the class: Zigzag\(\)"),
    "schedule as a string": (dict(schedule="ring"), "schedule: expected a Schedule such as .*objects, not strings"),
    "schedule as a class": (dict(schedule=df.Ring), r"schedule: .*not the class: Ring\(\)"),
    "kernel as a string": (dict(kernel="triton"), "kernel: expected a kernel such as .*objects, not strings"),
    "kernel as a class": (dict(kernel=df.kernels.Reference), r"kernel: .*not the class: Reference\(\)"),
    "group as a string": (dict(group="world"), "group: expected a ProcessGroup or a one-dimensional DeviceMesh"),
    "group as a number": (dict(group=2), "group: expected a ProcessGroup or a one-dimensional DeviceMesh"),
    "no group": (dict(group=None), "group: expected a ProcessGroup or a one-dimensional DeviceMesh"),
    "timeout as a string": (dict(timeout="60"), "timeout: expected a positive number of seconds.*got '60'"),
    "timeout as a bool": (dict(timeout=True), "timeout: expected a positive number of seconds.*got True"),
    "no time at all": (dict(timeout=0), "timeout: expected a positive number of seconds.*got 0"),
    "negative timeout": (dict(timeout=timedelta(seconds=-1)), "timeout: expected a positive number of seconds"),
    "endless timeout": (dict(timeout=inf), "timeout: expected a positive number of seconds.*got inf"),
    "timeout of no number": (dict(timeout=nan), "timeout: expected a positive number of seconds.*got nan"),
    "timeout of a simulator": (
        dict(group=df.transport.SimulatedTransport(df.transport.Simulator(2), 0), timeout=5),
        "timeout: SimulatedTransport has none",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_GROUPS.values(), ids=BAD_GROUPS.keys())
def test_bad_groups_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        df.ContextParallel(**{"group": ALONE} | arguments)


@pytest.mark.parametrize("timeout", [0.5, 60, timedelta(minutes=5), None])
def test_timeouts(timeout):
    df.ContextParallel(ALONE, timeout=timeout)


def test_cp_must_be_a_context_parallel():
    with pytest.raises(ValueError, match="cp: expected a ContextParallel or None"):
        df.attention(**tensors(), cp=ALONE)
