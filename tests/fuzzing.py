"""The work of `tests/fuzz.py`: solve random calls on simulated or real ranks, and compare with dense float64."""

from __future__ import annotations

import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from itertools import count
from multiprocessing import get_context

import torch
from torch import Tensor

import distflash as df
from tests import dense, oracle
from tests.dense import Inputs, Problem, Results
from tests.interpreter import bfloat16_in_the_interpreter
from tests.poison import poison_memory
from tests.random_calls import BUILDS, TENSORS, Case, describe, draw, draw_for_gpu
from tests.ranks import Ranks, as_near
from tests.strided import STRIDES, repeat_over

Solve = Callable[[Case, Inputs], list[Results]]


@dataclass(frozen=True)
class Options:
    """What is to be tried, as the command line says it."""

    seed: int
    cases: int | None
    minutes: float | None
    case: int | None
    device: str
    real: int | None
    jobs: int

    @property
    def interpreter(self) -> bool:
        return self.device == "cpu" and not self.real and os.environ.get("TRITON_INTERPRET") == "1"

    def draw(self, number: int) -> Case:
        if self.device == "cuda":
            return draw_for_gpu(self.seed, number)
        return draw(self.seed, number, ranks=self.real, interpreter=self.interpreter)

    def numbers(self, job: int) -> Iterator[int]:
        """The cases of one job. Those of one build stay together, so that no kernel is compiled twice."""
        if self.case is not None:
            yield from [self.case] * (job == 0)
            return
        deadline = time.monotonic() + 60 * self.minutes if self.minutes else float("inf")
        for number in count() if self.cases is None else range(self.cases):
            if time.monotonic() > deadline:
                return
            if number % len(BUILDS) % self.jobs == job:
                yield number

    def command(self, number: int) -> str:
        where = f" --device {self.device}" * (self.device != "cpu") + f" --real {self.real}" * bool(self.real)
        return f"PYTHONPATH=. python tests/fuzz.py --seed {self.seed} --case {number}{where}"


@dataclass
class Tally:
    """What has been tried so far."""

    failed: list[int] = field(default_factory=list)
    by: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, case: Case) -> None:
        for kind, name in describe(case).items():
            self.by.setdefault(kind, Counter())[name] += 1

    def join(self, other: Tally) -> None:
        self.failed += other.failed
        for kind, counter in other.by.items():
            self.by.setdefault(kind, Counter()).update(counter)

    @property
    def cases(self) -> int:
        return sum(self.by.get("ranks", Counter()).values())

    def __str__(self) -> str:
        parts = [
            f"{kind}: " + ", ".join(f"{name} {n}" for name, n in sorted(counter.items(), key=_natural))
            for kind, counter in self.by.items()
        ]
        return f"{self.cases} cases, {len(self.failed)} failed; " + "; ".join(parts)


def _natural(item: tuple[str, int]) -> tuple[int, str]:
    return len(item[0]) if item[0].isdigit() else 0, item[0]


def inputs(case: Case, device: str) -> Inputs:
    """The tensors of a case, whole, with equal numbers where strides of 0 need them."""
    x = dense.make_inputs(case.problem)
    values = {f.name: getattr(x, f.name) for f in fields(x)}
    for name, value in values.items():
        if value is not None:
            unused = {"dout": "out", "dlse": "lse"}.get(name, "out") not in case.uses and name in ("dout", "dlse")
            values[name] = repeat_over(value.zero_() if unused else value, case.strides[name]).to(device)
    return Inputs(**values)


def on_rank(case: Case, x: Inputs, transport: df.transport.Transport) -> Results:
    """This rank's part of a case, through the public face."""
    p, cp = case.problem, df.ContextParallel(transport, case.layout, case.schedule, case.kernel)
    held = {name: cp.shard(getattr(x, name), dim=2 if name == "dlse" else 1) for name in ("q", "dout", "dlse")}
    held |= {name: dense.keys_of(p, getattr(x, name), cp) for name in ("k", "v")}
    given = {name: _given(case, name, held[name]) for name in TENSORS}
    sinks = None if x.sinks is None else _given(case, "sinks", x.sinks.clone())
    got = df.attention(
        given["q"],
        given["k"],
        given["v"],
        mask=p.mask,
        cp=cp,
        seq_len=p.seq_len if case.says_seq_len else None,
        q_start=p.q_start,
        q_len=p.q_len,
        kv_layout=p.kv_layout,
        scale=p.scale,
        softcap=p.softcap or None,
        alibi_slopes=None if x.slopes is None else STRIDES[case.strides["slopes"]](x.slopes),
        sinks=sinks,
        dropout_p=p.dropout_p,
        dropout_seed=p.dropout_seed,
        return_lse=True,
    )
    results = dict(zip(("out", "lse"), got, strict=True))
    if case.gradients:
        torch.autograd.backward([results[name] for name in case.uses], [given[f"d{name}"] for name in case.uses])
    leaves = {**{name: given[name] for name in ("q", "k", "v")}, "sinks": sinks}
    return {name: t.detach() for name, t in results.items()} | {
        f"d{name}": leaves[name].grad for name in case.gradients
    }


def _given(case: Case, name: str, x: Tensor) -> Tensor:
    """``x`` at the case's strides, and with its gradient kept if it is to have one."""
    wanted, laid_out = name in case.gradients, STRIDES[case.strides[name]]
    if not case.views:
        return laid_out(x).detach().requires_grad_(wanted)
    x = laid_out(x.requires_grad_(wanted))
    if wanted:
        x.retain_grad()
    return x


def simulated(case: Case, x: Inputs) -> list[Results]:
    """By the simulator, in this process."""
    simulator = df.transport.Simulator(case.ranks, x.q.device, case.mesh or None)
    return simulator.run(lambda transport: on_rank(case, x, transport))


def real_part(case: Case) -> Results:
    """Runs as a rank, in a process of its own."""
    poison_memory()
    transport = as_near()
    transport.shape = case.mesh  # type: ignore[attr-defined]
    return on_rank(case, inputs(case, "cpu"), transport)


def check(case: Case, x: Inputs, parts: list[Results]) -> None:
    """Assert that the joined results equal dense attention."""
    p = case.problem
    got = dense.join(parts, case.layout, p.queries, p.kv_layout, p.seq_len)
    truth = dense.dense(p, x)
    expected = {"out", "lse"} | {f"d{name}" for name in case.gradients}
    assert got.keys() == expected, f"results {sorted(got)}"
    for name, value in got.items():
        assert value is not None and value.shape == truth[name].shape, f"{name}: shape"
        wide = name in ("lse", "dsinks")
        dtype = torch.promote_types(p.dtype, torch.float32) if wide else p.dtype
        assert value.dtype == dtype, f"{name}: dtype {value.dtype}"
        assert torch.equal(value == -torch.inf, truth[name] == -torch.inf), f"{name}: which rows see nothing"
    _assert_zeros(case, x, got)
    if p.dtype == torch.float64:
        for name, value in got.items():
            torch.testing.assert_close(
                value, truth[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )
    else:
        assert_as_exact_as_dense(case, x, got, truth)


def _assert_zeros(case: Case, x: Inputs, got: Results) -> None:
    """Queries with no visible key, and keys that no query sees, must have exact zeros."""
    visible = dense.visible(case.problem, x.q.device)
    for names, unseen in ((("out", "dq"), ~visible.any(-1)), (("dk", "dv"), ~visible.any(-2))):
        for name in names:
            if name in got:
                of_tokens = unseen[:, 0] if unseen.dim() == 3 else unseen  # of each sequence, or of all
                where = of_tokens.expand(got[name].shape[:2])
                assert (got[name][where] == 0).all(), f"{name}: not zero where nothing is seen"


def assert_as_exact_as_dense(case: Case, x: Inputs, got: Results, truth: Results) -> None:
    """Error against float64 at most a few times that of a dense float32 computation that rounds at the same places.

    As many times as `oracle.assert_as_exact` says. A computation of few numbers may be exact by luck: so the error that
    roundings are expected to bring counts, if it is larger, and beside it the floor of `dense.assert_no_less_exact`.
    """
    p, plain, expected = case.problem, _plain(case, x), _expected_errors(case, x, truth)
    times = 3 if p.dtype == torch.float32 else 2
    unit = torch.finfo(torch.float32).eps * max(1.0, _largest_terms(p, x), p.softcap)
    gradients = [truth[name] for name in truth if name not in ("out", "lse")]
    for name, value in got.items():
        alike = {"out": [truth["out"]], "lse": [torch.ones_like(value)]}.get(name, gradients)
        for size, slack in ((_norm, times), (_largest, 1.5 * times)):
            error, sample = (size(_seen(t) - _seen(truth[name])) for t in (value, plain[name]))
            bar = max(sample, size(expected[name]))
            limit = slack * bar + unit * max(map(size, alike))
            assert error <= limit, f"{name}: error {error:.3e}, dense {bar:.3e}, limit {limit:.3e} ({size.__name__})"


def _norm(t: Tensor) -> float:
    return float(_seen(t).norm())


def _largest(t: Tensor) -> float:
    return float(_seen(t).abs().max()) if t.numel() else 0.0


def _seen(t: Tensor) -> Tensor:
    """0 for the lse of a query that sees nothing."""
    return t.double().masked_fill(t == -torch.inf, 0.0)


def _largest_terms(p: Problem, x: Inputs) -> float:
    """A score is as inexact as what it sums is large, or as its cap is: kernels compute tanh from exp. So is lse."""
    positive = replace(x, q=x.q.abs(), k=x.k.abs(), slopes=None if x.slopes is None else -x.slopes)
    return dense.largest_score(replace(p, scale=abs(p.scale or p.d_qk**-0.5), softcap=0.0), positive)


def _expected_errors(case: Case, x: Inputs, truth: Results) -> Results:
    """The size of the errors, element by element, if P, dS, out and each result are rounded once: all independent.

    dS = P (dP - delta), and delta is of the rounded out: a change of it changes a whole row.
    """
    p, unit = case.problem, torch.finfo(case.problem.dtype).eps / 2
    q, k, v, dout, out = (t.double() for t in (x.q, x.k, x.v, x.dout, truth["out"]))
    lse = _seen(truth["lse"])
    probability = (dense.scores(p, q, k, x.slopes) - lse[..., None]).exp()
    q, k, v, dout, out = (dense.per_query_head(p, t).transpose(1, 2) for t in (q, k, v, dout, out))
    delta = (dout * out).sum(-1) - x.dlse
    change = unit * (dout * out).norm(dim=-1)
    ds = unit * probability * (dout @ v.mT - delta[..., None])
    scale = p.d_qk**-0.5 if p.scale is None else p.scale
    squares = {
        "out": (unit * probability).square() @ v.square(),
        "dq": scale**2 * (ds.square() @ k.square() + (change[..., None] * (probability @ k)).square()),
        "dk": scale**2 * (ds.square() + (probability * change[..., None]).square()).mT @ q.square(),
        "dv": (unit * probability).square().mT @ dout.square(),
    }
    squares = {name: _per_head_of(truth[name], t) for name, t in squares.items()}
    if x.sinks is not None:
        squares["dsinks"] = ((x.sinks.double()[None, :, None] - lse).exp() * change).square().sum((0, 2))
    errors = {name: (t + (unit * truth[name]).square()).sqrt() for name, t in squares.items()}
    return errors | {"lse": torch.zeros_like(lse)}


def _per_head_of(like: Tensor, x: Tensor) -> Tensor:
    """``[B, H, S, D]`` with tokens first, summed over the query heads of each head of ``like [B, S, G, D]``."""
    return x.unflatten(1, (like.shape[2], -1)).sum(2).transpose(1, 2)


def _plain(case: Case, x: Inputs) -> Results:
    """Dense in float32, rounding to the inputs' dtype where a kernel does."""
    p = case.problem
    scale = p.d_qk**-0.5 if p.scale is None else p.scale
    scores = df.kernels.base.Scores(scale, p.softcap, x.slopes, x.sinks)
    positions = p.q_start + torch.arange(p.queries, device=x.q.device)
    visible = dense.visible(p, x.q.device)
    whole = oracle.Inputs(x.q, x.k, x.v, x.dout, x.dlse, scores, visible, positions)
    results = oracle.dense(whole, torch.float32, stored=p.dtype)
    if x.sinks is not None:
        delta = (results["out"] * x.dout.float()).sum(-1).transpose(1, 2) - x.dlse
        results["dsinks"] = -((x.sinks[None, :, None] - _seen(results["lse"])).exp().float() * delta).sum((0, 2))
    return results


def try_one(options: Options, number: int, solve: Solve, tally: Tally) -> None:
    """Count one case; where it fails, say how it is repeated."""
    case = options.draw(number)
    tally.add(case)
    try:
        x = inputs(case, options.device)
        check(case, x, solve(case, x))
    except Exception as error:
        tally.failed.append(number)
        words = "".join(traceback.format_exception(error)[-4 if options.case is None else None :])
        print(f"FAILED  {options.command(number)}\n  {case}\n{words}", flush=True)


def run_job(options: Options, job: int) -> Tally:
    """The cases of one of so many processes."""
    warnings.filterwarnings("ignore")
    torch.backends.cuda.matmul.allow_tf32 = False  # the dense computations' float32 products must be such
    tally = Tally()
    with ExitStack() as stack:
        if options.interpreter:
            stack.enter_context(bfloat16_in_the_interpreter())
        solve: Solve = simulated
        if options.real:
            ranks = Ranks(options.real, "gloo", timeout=60)
            stack.callback(ranks.stop)
            solve = lambda case, x: ranks.run(real_part, case)  # noqa: E731
        else:
            poison_memory(warn_only=options.device == "cuda")  # cuBLAS has sums that are not deterministic
            stack.callback(poison_memory, False)
        for number in options.numbers(job):
            try_one(options, number, solve, tally)
            if tally.cases % 500 == 0:
                print(f"job {job}: {tally.cases} cases, {len(tally.failed)} failed", flush=True)
            if options.device == "cuda" and not _has_gpu():
                print(f"job {job}: ends after case {number}, which has left it no GPU", flush=True)
                break
    return tally


def _has_gpu() -> bool:
    """After an illegal access a process can do nothing more on its GPU."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run(options: Options) -> Tally:
    """All jobs."""
    if options.jobs == 1:
        return run_job(options, 0)
    total = Tally()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for tally in pool.map(run_job, [options] * options.jobs, range(options.jobs)):
            total.join(tally)
    return total
