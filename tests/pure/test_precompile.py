"""`distflash compile`: which calls of which kernel the options describe. That they compile is in `test_warming`."""

from dataclasses import replace

import pytest

from distflash import warming
from distflash.__main__ import main
from distflash.kernels import Hopper, Triton


@pytest.fixture
def rehearsals(monkeypatch):
    """What would be compiled, also where triton interprets."""
    found = []
    for kernel in (Hopper, Triton):
        monkeypatch.setattr(kernel, "rehearsing", lambda self, machine: replace(self, machine=machine))
    monkeypatch.setattr(warming, "compile_all", lambda work, machine: found.append(work) or ())
    return found


def described(rehearsals, *options):
    """One rank's call, as options describe it."""
    rehearsals.clear()
    assert main(["compile", "--gpu", "sm_90", "--seq-lens", "256", *options]) == 0
    (found,) = rehearsals
    return found


def test_every_rank_and_length_is_compiled(rehearsals):
    assert main(["compile", "--gpu", "sm_90", "--ranks", "4", "--seq-lens", "256", "512"]) == 0
    calls = [(each.specification.tokens.seq_len, each.calls.transport.rank) for each in rehearsals]
    assert calls == [(S, rank) for S in (256, 512) for rank in range(4)]


def test_dropout_largest_scores_and_determinism_are_options(rehearsals):
    plain = described(rehearsals)
    assert not plain.specification.problem.dropout_p and not plain.specification.problem.max_logits
    assert not plain.kernel.deterministic
    kinds = {warming.kind_of(plain.calls, plain.specification, plain.kernel)}
    for option, chosen in (
        ("--dropout-p 0.25", lambda work: work.specification.problem.dropout_p == 0.25),
        ("--max-logits", lambda work: work.specification.problem.max_logits),
        ("--deterministic", lambda work: work.kernel.deterministic),
    ):
        work = described(rehearsals, *option.split())
        assert chosen(work), option
        kinds.add(warming.kind_of(work.calls, work.specification, work.kernel))
    assert len(kinds) == 4


def test_what_cannot_be_compiled_is_printed(rehearsals, capsys):
    for options, words in (("--head-dim 20", "d_qk = 20"), ("--dropout-p 1", "dropout_p: expected a probability")):
        assert main(["compile", "--gpu", "sm_80", "--seq-lens", "256", *options.split()]) == 1
        assert words in capsys.readouterr().out and not rehearsals
