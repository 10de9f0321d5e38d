"""The fuzzing script draws what it claims, the same in every run, and detects errors."""

from dataclasses import replace

import pytest
import torch

from tests import fuzz
from tests.fuzzing import Options, Tally, inputs, run_job, simulated, try_one
from tests.random_calls import BUILDS, describe, draw, draw_for_gpu

OPTIONS = Options(seed=7, cases=40, minutes=None, case=None, device="cpu", real=None, jobs=1)


@pytest.mark.timeout(120)
def test_forty_cases():
    tally = run_job(OPTIONS, 0)
    assert (tally.cases, tally.failed) == (40, [])


@pytest.mark.parametrize("draws", [draw, draw_for_gpu])
def test_a_case_follows_from_its_seed_and_number(draws):
    assert [repr(draws(3, n)) for n in range(30)] == [repr(draws(3, n)) for n in range(30)]
    assert repr(draws(3, 0)) != repr(draws(4, 0)) != repr(draws(4, len(BUILDS)))


def test_cases_are_of_every_kind():
    cases = [draw(1, n) for n in range(1000)]
    seen = {kind: {describe(case)[kind] for case in cases} for kind in describe(cases[0])}
    assert seen["kernel"] == {"Reference", "best"}
    assert seen["layout"] == {"Contiguous", "Zigzag", "Striped", "Dealt"}
    assert seen["schedule"] == {"Ring", "AllGather", "DoubleRing", "PassQuery", "Ulysses"}
    assert seen["ranks"] == {str(n) for n in range(1, 17)}
    assert seen["calls"] == {"self-attention", "chunk"} and seen["masks"] == {"for all", "for each row"}
    assert any(case.problem.queries > case.problem.seq_len for case in cases)
    assert seen["dtype"] == {"float64", "float32", "bfloat16", "float16"}
    assert {case.problem.kv_heads for case in cases} == set(range(1, 9))
    assert any(case.problem.seq_len == 1 and case.ranks > 1 for case in cases)


def test_jobs_share_all_cases_and_no_build():
    shares = [list(replace(OPTIONS, cases=100, jobs=3).numbers(job)) for job in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(100))
    builds = [{number % len(BUILDS) for number in share} for share in shares]
    assert sum(map(len, builds)) == len(BUILDS)


def first(kind):
    """The first case whose out is of this dtype and holds some numbers."""
    return next(
        n
        for n in range(100)
        if (p := OPTIONS.draw(n).problem).dtype == kind and min(p.seq_len, p.queries) * p.batch > 3
    )


@pytest.mark.parametrize(
    ("dtype", "change"), [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.2), (torch.float16, 0.05)]
)
def test_a_wrong_number_is_noticed(dtype, change, capsys):
    """One element, off by so much of the largest."""

    def solve(case, x):
        parts = simulated(case, x)
        out = max((part["out"] for part in parts), key=torch.Tensor.numel)
        out.view(-1)[-1] += change * max(1.0, float(x.v.abs().max()))
        return parts

    number, tally = first(dtype), Tally()
    try_one(OPTIONS, number, solve, tally)
    assert tally.failed == [number]
    said = capsys.readouterr().out
    assert f"python tests/fuzz.py --seed 7 --case {number}\n" in said and "Problem(mask=" in said and "out: " in said


def test_a_case_that_raises_is_noticed():
    tally = Tally()
    for number in (0, 1):
        try_one(OPTIONS, number, lambda case, x: 1 / 0, tally)
    assert tally.failed == [0, 1] and "2 cases, 2 failed" in str(tally)


def test_expanded_tensors_hold_equal_numbers():
    case = replace(OPTIONS.draw(first(torch.float64)), uses=("out",))
    case = replace(case, strides=case.strides | {"k": "one number"})
    x = inputs(case, "cpu")
    assert (x.k == x.k.flatten()[0]).all() and x.dout.any() and not x.dlse.any()


def test_the_command_line():
    assert vars(fuzz.parse(["--minutes", "2", "--seed", "5"])) == vars(OPTIONS) | dict(seed=5, minutes=2, cases=None)
    assert fuzz.parse([]).cases == 1000
    with pytest.raises(SystemExit):
        fuzz.parse(["--real", "2", "--device", "cuda"])
