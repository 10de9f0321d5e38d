"""Compilation ahead of time: the launches of a dry run, once per kind of call, without side effects."""

import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distflash as df
from distflash import warming
from distflash.agreement import Agreement
from distflash.call import Calls
from distflash.exact import ByValue
from distflash.kernels import Kernel, Problem, Reference
from distflash.kernels.base import KeyGradient
from distflash.kernels.machine import MACHINES
from distflash.kernels.triton import compiling
from distflash.specification import CallTokens, Specification
from distflash.transport import Alone, Silent

META = torch.device("meta")
ZIGZAG, RING, CAUSAL = df.Zigzag(), df.Ring(), df.Causal()
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Passing(Kernel):
    """Notes the passes that it is asked for."""

    passes: list = field(default_factory=list, compare=False, repr=False)
    given: list = field(default_factory=list, compare=False, repr=False)

    def not_supported_reasons(self, problem):
        return []

    def forward(self, q, keys, each, scores, into):
        assert q.device == META and all(x.k.device == META for x in keys)
        self.passes.append(("forward", each.sources))
        self.given.append((scores.dropout is not None, into.maxima is not None))

    def preprocess(self, q, out, lse, dout, dlse):
        self.passes.append(("save", dlse is not None))
        return Reference().preprocess(q, out, lse, dout, dlse)

    def backward(self, saved, keys, each, scores, dq, dkv: KeyGradient):
        assert dkv.dk.shape == keys.k.shape
        self.passes.append(("backward", each.sources))


@pytest.mark.parametrize(("device", "count"), [("cuda:0", 1), ("cpu", 0)])
def test_a_group_on_gpus_begins_what_every_first_call_needs(device, count, monkeypatch):
    begun = []
    monkeypatch.setattr("distflash.kernels.triton.compiling.read_compiler_early", lambda: begun.append(1))
    df.ContextParallel(Silent(0, 2, torch.device(device)))
    assert len(begun) == count


def calls_of(world_size=2, rank=0, layout=ZIGZAG, schedule=RING, kernel=None):
    transport = Silent(rank, world_size, META) if world_size > 1 else Alone(device=META)
    return Calls(transport, layout, schedule.on((world_size,)), kernel, Agreement(transport, every_call=False))


def asked(S=64, mask=CAUSAL, batch=1, dtype=torch.float32, needs_grad=True, **special):
    problem = Problem(META, dtype, 4, 2, 16, 16, **special)
    return Specification(problem, batch, CallTokens(S, 0, S), ByValue(mask), None, needs_grad)


MASKS = [
    df.Causal(),
    df.Window(7),
    df.Causal() & df.Documents([0, 10, 64]),
    df.Causal() & (df.Window(7) | df.FirstTokens(4)),
]


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("schedule", [df.Ring(), df.AllGather(), df.Ulysses(), df.PassQuery()], ids=repr)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rehearsal_makes_the_passes_of_the_call(world_size, schedule, mask):
    for rank in range(world_size):
        calls, kernel = calls_of(world_size, rank, schedule=schedule), Passing()
        warming.Rehearsal(calls, kernel, asked(mask=mask, sinks=True))()
        plan = calls.plan_on_host(ByValue(mask), CallTokens(64, 0, 64))
        expected = {
            direction: [each.sources for stage in stages for each in stage.passes]
            for direction, stages in (("forward", plan.forward), ("backward", plan.backward))
        }
        made = {way: [sources for name, sources in kernel.passes if name == way] for way in expected}
        assert made["forward"] == expected["forward"]
        assert made["backward"] == 2 * expected["backward"]  # without a gradient of lse, and with one
        assert {dlse for name, dlse in kernel.passes if name == "save"} <= {False, True}


def test_a_rehearsal_of_a_forward_alone_has_no_backward():
    kernel = Passing()
    warming.Rehearsal(calls_of(), kernel, asked(needs_grad=False, alibi=True))()
    assert {name for name, _ in kernel.passes} == {"forward"}


@pytest.mark.parametrize("schedule", [df.Ring(), df.Ulysses(), df.PassQuery()], ids=repr)
@pytest.mark.parametrize(("dropout_p", "max_logits"), [(0.0, False), (0.1, False), (0.0, True), (0.1, True)])
def test_a_rehearsal_has_the_dropout_and_the_largest_scores_that_were_asked_for(dropout_p, max_logits, schedule):
    calls, kernel = calls_of(schedule=schedule), Passing()
    shapes = warming.Shapes((1, 32, 4, 16), (1, 32, 2, 16), (1, 32, 2, 16))
    specification = warming.specification_of(
        calls, shapes, torch.float32, CAUSAL, 64, True, dropout_p=dropout_p, max_logits=max_logits
    )
    warming.Rehearsal(calls, kernel, specification)()
    dropout, largest = (set(each) for each in zip(*kernel.given, strict=True))
    assert dropout == {dropout_p > 0}
    assert True in largest if max_logits else largest == {False}  # other ranks' queries have none under `PassQuery`


def test_a_rehearsal_of_rows_and_chunks():
    kernel, mask = Passing(), df.Rows([df.Causal(), df.Window(3)])
    warming.Rehearsal(calls_of(), kernel, asked(mask=mask, batch=2))()
    chunk = replace(asked(needs_grad=False), tokens=CallTokens(64, 32, 32))
    warming.Rehearsal(calls_of(), kernel, chunk)()
    assert kernel.passes


def test_calls_that_differ_in_data_are_of_one_kind():
    def kind(calls=None, kernel=None, **options):
        return warming.kind_of(calls or calls_of(), asked(**options), kernel or Reference())

    def packed(*ends):
        return df.Causal() & df.Documents([0, *ends])

    assert kind(mask=packed(10, 64)) == kind(mask=packed(30, 40, 64)) == kind(mask=packed(10, 64), S=64)
    assert kind(S=4096) == kind(S=4096 + 16) and kind(softcap=30.0) == kind(softcap=50.0)
    assert kind(dropout_p=0.1) == kind(dropout_p=0.2)
    others = [
        kind(dropout_p=0.1),
        kind(dropout_p=0.5),  # a multiple of 2^-12
        kind(S=4096, dropout_p=0.1),
        kind(S=4096 + 256, dropout_p=0.1),  # positions that are not consecutive within tiles
        kind(max_logits=True),
        kind(mask=packed(64)),
        kind(),
        kind(S=65),
        kind(S=128),
        kind(dtype=torch.bfloat16),
        kind(needs_grad=False),
        kind(sinks=True),
        kind(softcap=30.0),
        kind(batch=2),
        kind(calls_of(4)),
        kind(calls_of(layout=df.Striped())),
        kind(calls_of(schedule=df.AllGather())),
        kind(kernel=Passing()),
    ]
    assert len(set(others)) == len(others)


@dataclass(frozen=True)
class Compiled(Reference):
    """Seems to have something to compile."""

    def rehearsing(self, machine):
        return self


@pytest.fixture
def compiled(monkeypatch):
    """The specifications that would have been compiled, on a machine that seems to have a GPU."""
    found = []
    monkeypatch.setattr(warming, "machine_of", lambda device: MACHINES["sm_90"])
    monkeypatch.setattr(warming, "compile_all", lambda work, machine: found.append(work.specification) or ())
    return found


def on_gpu(specification):
    return replace(specification, problem=replace(specification.problem, device=torch.device("cuda", 0)))


def test_only_calls_on_gpus_that_have_something_to_compile_are_compiled(compiled):
    for specification in (asked(), on_gpu(asked(batch=0))):
        warming.compile_for(calls_of(), specification, Compiled())
    warming.compile_for(calls_of(), on_gpu(asked()), Reference())
    assert not compiled
    warming.compile_for(calls_of(), on_gpu(asked()), Compiled())
    assert [each.problem.dtype for each in compiled] == [torch.float32]


def test_each_kind_is_compiled_once_unless_it_failed(tmp_path, monkeypatch):
    started, errors = [], []

    class Workers:
        def __init__(self, work, machine, processes):
            started.append(work.specification.problem.dtype)

        def wait(self, seconds):
            return True

        def finish(self):
            return SimpleNamespace(errors=tuple(errors), compiled=())

    monkeypatch.setattr(compiling, "Workers", Workers)
    monkeypatch.setattr(compiling, "cache_folder", lambda: tmp_path)

    def compile_all(dtype):
        work = warming.Rehearsal(calls_of(), Compiled(), asked(dtype=dtype))
        return warming.compile_all(work, MACHINES["sm_90"])

    errors.append("no more memory")
    assert compile_all(torch.float32) == ("no more memory",)
    errors.clear()
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16):
        assert compile_all(dtype) == ()
    assert started == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("fails", ["raises", "says"])
def test_a_call_goes_on_where_nothing_could_be_compiled(compiled, monkeypatch, caplog, fails):
    def compile_all(work, machine):
        if fails == "raises":
            raise OSError("no more processes")
        return ("no more processes",)

    monkeypatch.setattr(warming, "compile_all", compile_all)
    with caplog.at_level(logging.WARNING, "distflash"):
        warming.compile_for(calls_of(), on_gpu(asked()), Compiled())
    assert "compiled when they are first launched, and not before: no more processes" in caplog.text


def test_warm_up_takes_what_attention_takes():
    cp = df.ContextParallel(Alone())
    cp.warm_up((1, 64, 4, 16), (1, 64, 2, 16), mask=df.Causal())
    for arguments, problem in (
        (((1, 64, 4, 16), (1, 64, 3, 16)), "heads"),
        (((1, 64, 4), (1, 64, 2)), "q"),
        (((1, 64, 4, 16), (1, 64, 2, 16), None, torch.float32, df.Documents([0, 10])), "seq_len=10"),
    ):
        with pytest.raises(ValueError, match=problem):
            cp.warm_up(*arguments)
    with pytest.raises(ValueError, match="dropout_p: expected a probability"):
        cp.warm_up((1, 64, 4, 16), (1, 64, 2, 16), dropout_p=1.0)


@pytest.mark.parametrize("numbers", [{}, {"dropout_p": 0.1}, {"return_max_logits": True}], ids=str)
def test_warm_up_is_of_the_specification_of_the_call(numbers):
    """So what it prepares is what the call uses."""
    cp = df.ContextParallel(Alone())
    q, k, v = (torch.zeros(1, 64, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    cp.warm_up(q.shape, k.shape, dtype=torch.float32, mask=CAUSAL, **numbers)
    seed = {"dropout_seed": 7} if "dropout_p" in numbers else {}
    df.attention(q, k, v, mask=CAUSAL, cp=cp, **numbers, **seed)
    assert cp.calls.prepare.cache_info().misses == 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("ranks", "options", "numbers"),
    [(2, "", ""), (1, "--dropout-p 0.1 --max-logits", "dropout_p=0.1, dropout_seed=7, return_max_logits=True")],
    ids=["plain", "dropout and largest scores"],
)
def test_what_was_compiled_without_a_gpu_is_what_a_call_launches(tmp_path, ranks, options, numbers):
    """In a process of its own, since in this one triton may interpret."""
    code = f"""
        import os, sys, torch
        import distflash as df
        from distflash.__main__ import main
        options = "compile --gpu sm_90 --ranks {ranks} --seq-lens 256 --heads 2 --kv-heads 1 --head-dim 32"
        options += " --dtype float32 {options}"
        assert main(options.split()) == 0
        folder = os.environ["TRITON_CACHE_DIR"]
        before = set(os.listdir(folder))
        assert main(options.split()) == 0 and len(before) > 4
        from benchmarks import stub
        stub.start()
        for rank in range({ranks}):
            transport = df.transport.Silent(rank, {ranks}, torch.device("cpu")) if {ranks} > 1 else df.transport.Alone()
            cp = df.ContextParallel(transport, kernel=stub.KERNELS["triton"])
            q, k, v = (torch.zeros(1, 256 // {ranks}, heads, 32, requires_grad=True) for heads in (2, 1, 1))
            given = dict(mask=df.Causal(), cp=cp, return_lse=True, {numbers})
            out, lse, *_ = df.attention(q, k, v, **given)
            torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
            torch.autograd.grad(df.attention(q, k, v, **given)[0].sum(), (q, k, v))
        print("new:", set(os.listdir(folder)) - before)
    """
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280, env=variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "new: set()", done.stdout + done.stderr
