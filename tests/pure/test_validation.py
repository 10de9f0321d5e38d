"""Valid arguments, and descriptions of wrong ones. Errors are in tests/wrong_calls.py."""

from datetime import timedelta
from fractions import Fraction
from functools import partial
from math import inf, nan

import numpy as np
import pytest
import torch

import distflash as df
from distflash import validation
from distflash.transport import Alone, Simulator
from tests import strided
from tests.wrong_calls import KEYWORDS, NUMBERS, PER_HEAD, W, tensors

pytestmark = [  # of Triton's interpreter
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


def drawn():
    torch.manual_seed(0)
    return {name: torch.randn_like(x) for name, x in tensors().items()}


def test_good_arguments_are_not_refused():
    assert df.attention(**tensors()).shape == (1, 4, 4, 16)


@pytest.mark.parametrize("row", [*NUMBERS, *PER_HEAD, *KEYWORDS], ids=lambda row: row.what)
def test_one_device_refuses_the_same(row):
    with pytest.raises(row.error, match=row.words):
        row.call(None)


HALF = torch.tensor(0.5)
HALVES = [
    np.float16(0.5), np.float32(0.5), np.float64(0.5), Fraction(1, 2), HALF, HALF.double(), HALF.bfloat16(),
    HALF.clone().requires_grad_().detach(), torch.nn.Parameter(HALF, requires_grad=False),
]  # fmt: skip


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("number", HALVES, ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}")
def test_real_numbers_of_any_kind_are_taken(name, number):
    inputs = drawn()
    assert torch.equal(df.attention(**inputs, **{name: number}), df.attention(**inputs, **{name: 0.5}))


@pytest.mark.parametrize(
    "number", [2, np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor(2, dtype=torch.int32)], ids=repr
)
def test_whole_numbers_are_numbers(number):
    inputs = drawn()
    assert torch.equal(df.attention(**inputs, softcap=number), df.attention(**inputs, softcap=2.0))
    assert torch.equal(df.attention(**inputs, seq_len=number + 2), df.attention(**inputs))


def test_ranks_agree_on_a_number_however_it_is_written():
    def work(transport):
        scale, softcap, seq_len = ((0.5, 2, 8), (np.float32(0.5), torch.tensor(2.0), np.int64(8)))[transport.rank]
        cp = df.ContextParallel(transport)
        return df.attention(**tensors(), scale=scale, softcap=softcap, seq_len=seq_len, cp=cp)

    assert len(Simulator(W).run(work)) == W


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_numbers_a_head_may_have_any_stride(name):
    """Kernels are given them one after the other, whatever reads them."""
    seen = []

    class Watching(df.kernels.Reference):
        def forward(self, q, keys, each, scores, into):
            seen.append(getattr(scores, name))
            super().forward(q, keys, each, scores, into)

    inputs, table = drawn(), torch.randn(4, 3)
    for numbers in (table[:, 1], torch.tensor(0.3).expand(4)):
        got = df.attention(**inputs, **{name: numbers}, cp=df.ContextParallel(Alone(), kernel=Watching()))
        assert torch.equal(got, df.attention(**inputs, **{name: numbers.contiguous()}))
        assert seen.pop().is_contiguous()


def view_that_negates(x):
    """Of the same elements, of which memory has the negative ones."""
    view = torch.complex(x, -x).conj().imag
    assert view.is_neg()
    return view


READERS = [df.kernels.Reference(), df.kernels.Triton(interpret=True)]  # Triton's reads memory


@pytest.mark.parametrize("kernel", READERS, ids=repr)
@pytest.mark.parametrize("schedule", [df.Ring(), df.PassQuery()], ids=repr)
def test_a_negated_view_is_what_it_stands_for(schedule, kernel):
    """Of all tensors, and of the gradients of both results, whatever travels."""
    inputs = drawn()
    dout, dlse = (torch.randn(shape) for shape in ((1, 4, 4, 16), (1, 4, 4)))

    def results(transport, change):
        cp = df.ContextParallel(transport, schedule=schedule, kernel=kernel)
        leaves = {name: cp.shard(x).requires_grad_() for name, x in inputs.items()}
        found = df.attention(**{name: change(x) for name, x in leaves.items()}, cp=cp, return_lse=True)
        torch.autograd.backward(found, (change(cp.shard(dout)), change(cp.shard(dlse, 2))))
        return [*found, *(x.grad for x in leaves.values())]

    plain, negated = (
        Simulator(2).run(lambda transport, change=change: results(transport, change))
        for change in (torch.clone, view_that_negates)
    )
    for got, expected in zip(negated, plain, strict=True):
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("view", [view_that_negates, strided.negated])
@pytest.mark.parametrize("kernel", READERS, ids=repr)
def test_a_negated_view_is_what_it_stands_for_over_a_cache(kernel, view):
    prompt, new = ([torch.randn(1, n, heads, 16) for heads in (4, 2, 2)] for n in (6, 1))
    per_head = {"sinks": torch.randn(4), "alibi_slopes": torch.rand(4)}

    def results(transport, change):
        cp = df.ContextParallel(transport, kernel=kernel)
        cache = df.Cache(cp, batch=1, kv_heads=2, d_qk=16, capacity=16, dtype=torch.float32)
        heads, mine = {name: change(x) for name, x in per_head.items()}, [change(cp.shard(x)) for x in prompt]
        out = df.attention(*mine, mask=df.Causal(), cp=cp, cache=cache, seq_len=6, **heads)
        return out, df.decode(*map(change, new), cache=cache, **heads)

    plain, negated = (
        Simulator(2).run(lambda transport, change=change: results(transport, change)) for change in (torch.clone, view)
    )
    for got, expected in zip(negated, plain, strict=True):
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("kernel", READERS, ids=repr)
def test_a_negated_seed_is_what_it_stands_for(kernel):
    cp, inputs, seed = df.ContextParallel(Alone(), kernel=kernel), drawn(), torch.tensor(12345)
    plain, negated = (
        df.attention(**inputs, cp=cp, dropout_p=0.5, dropout_seed=s) for s in (seed, strided.negated(seed))
    )
    assert torch.equal(negated, plain)


def test_a_gpu_that_the_group_does_not_send_from_is_named():
    """Ranks that forget to choose their GPU all send from the first one."""
    q = type("OnGpu", (), {"device": torch.device("cuda", 1), "is_meta": False, "is_cuda": True})()
    group = type(
        "Group", (), {"world_size": 2, "device": torch.device("cuda", 0), "supports_device": lambda self, device: True}
    )()
    words = validation.device_problem(q, group)
    assert "q: is on cuda:1, but this process group sends from cuda:0; call torch.cuda.set_device" in words
    group.device = torch.device("cuda", 1)
    assert validation.device_problem(q, group) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 3), "a Tensor of torch.float32 [2, 3]"),
        (torch.zeros((), device="meta"), "a Tensor of torch.float32 []"),
        (torch.tensor(0.5), "tensor(0.5000)"),
        (np.zeros(3), "a ndarray of float64 [3]"),
        (np.float32(0.5), "np.float32(0.5)"),
        ("x" * 500, "'" + "x" * 79 + " ... (str)"),
        (None, "None"),
    ],
)
def test_what_came_is_said_in_few_words(value, words):
    assert validation.came(value) == words


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


def test_a_negated_view_is_sent_as_what_it_stands_for():
    def part(negate, transport):
        q, k, v = (torch.randn(1, 3, 2, 1, generator=torch.Generator().manual_seed(n)) for n in range(3))
        if negate:
            q, k, v = map(strided.negated, (q, k, v))
        cp = df.ContextParallel(transport, schedule=df.PassQuery())
        return df.attention(q, k, v, cp=cp)

    plain, negated = (Simulator(2).run(partial(part, n)) for n in (False, True))
    assert all(map(torch.equal, plain, negated))
