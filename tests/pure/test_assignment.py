from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from benchmarks.workloads import corpus
from distflash import assignment
from distflash.workload import Workload
from tests.strategies import masks, patterns


def equal(seq_len, ranks):
    return [(rank + 1) * seq_len // ranks - rank * seq_len // ranks for rank in range(ranks)]


def assign(work, shares, ranks, aim, chunk):
    (found,) = assignment.assign(work, shares, ranks, [aim], chunk)
    assert found.most == max(sum(work.pairs(*piece) for piece in pieces) for pieces in found.held)
    return found.held


@given(st.data(), st.integers(0, 60), st.integers(1, 9), st.sampled_from([1.0, 1.05, 2.0]), st.integers(1, 9))
def test_every_token_is_dealt_once_and_shares_are_kept(data, seq_len, ranks, limit, chunk):
    work = Workload.of([data.draw(masks(seq_len) | patterns(seq_len))], seq_len, chunk)
    shares = data.draw(st.sampled_from([equal(seq_len, ranks), None]))
    held = assign(work, shares, ranks, assignment.Aim(limit), chunk)
    assert len(held) == ranks and all(start < stop for pieces in held for start, stop in pieces)
    assert all(a[1] < b[0] for pieces in held for a, b in pairwise(pieces))
    assert sorted(p for pieces in held for start, stop in pieces for p in range(start, stop)) == list(range(seq_len))
    if shares is not None:
        assert [sum(stop - start for start, stop in pieces) for pieces in held] == shares


@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_sparse_tokens_are_those_of_a_plain_list(data, lengths):
    """The sparsest first, unit by unit; what is counted and taken of them is what slices of the list say."""
    ends = [0, *accumulate(lengths)]
    work = Workload.of([df.Causal() & df.Documents(ends)], ends[-1], 4)
    units = sorted((assignment._Unit.of(work, *piece) for piece in pairwise(ends)), key=lambda u: (u.density, u.start))
    line = [token for unit in units for token in range(unit.start, unit.stop)]
    sparse = assignment._Sparse(work, data.draw(st.sampled_from([0.0, 2.0, 9.0])), units)
    skips = [0, *accumulate(unit.tokens for unit in units)]

    def pairs(skipped, count):
        return sum(work.pairs(token, token + 1) for token in line[skipped : skipped + count])

    count = data.draw(st.integers(1, len(line)))
    limit = data.draw(st.integers(0, pairs(0, len(line))))
    fitting = [skip for skip in skips if skip + count <= len(line) and pairs(skip, count) <= limit]
    window = sparse.window(count, limit)
    assert sparse.left == len(line) and window == max(fitting, default=0)
    assert sparse.pairs(count, window) == pairs(window, count)
    taken, rest = sparse.take(count, window)
    assert sorted(tokens_of(taken)) == sorted(line[window : window + count])
    assert all(unit.pairs == work.pairs(unit.start, unit.stop) for unit in (*taken, *sparse.units))
    assert rest is None or rest.density > sparse.split_at
    left = tokens_of(sparse.units if rest is None else [*sparse.units, rest])
    assert sorted(left) == sorted(line[:window] + line[window + count :])
    assert sparse.left == sum(unit.tokens for unit in sparse.units)
    if sparse.units:
        unit = data.draw(st.sampled_from(sparse.units))
        assert sparse.take_unit_before(unit.stop, unit.tokens - 1) is None
        assert sparse.take_unit_before(unit.stop, unit.tokens) == unit
        assert sparse.take_unit_before(unit.stop, unit.tokens) is None


def tokens_of(units):
    return [token for unit in units for token in range(unit.start, unit.stop)]


def test_short_documents_stay_whole_and_a_long_one_is_cut():
    mask = df.Causal() & df.Documents([0, 400, 500, 600, 700, 800])
    held = assign(Workload.of([mask], 800, 50), equal(800, 2), 2, assignment.Aim(1.05), 50)
    pieces = [piece for of_rank in held for piece in of_rank]
    assert len(pieces) <= 4 and sum(start < 400 for start, _ in pieces) == 2
    assert sum(start % 100 > 0 for start, _ in pieces if start > 400) <= 1, "at most one short document is cut"
    pairs = [sum(Workload.of([mask], 800, 50).pairs(*piece) for piece in pieces) for pieces in held]
    assert max(pairs) <= 1.05 * sum(pairs) / 2


def test_a_causal_sequence_is_dealt_as_a_zigzag():
    """Each rank has one piece of the beginning and one of the end, and as many pairs as the others."""
    work = Workload.of([df.Causal()], 64 * 512, 512)
    held = assign(work, equal(64 * 512, 8), 8, assignment.Aim(1.0), 512)
    pairs = [sum(work.pairs(*piece) for piece in pieces) for pieces in held]
    assert all(len(pieces) <= 2 for pieces in held) and max(pairs) <= 1.01 * sum(pairs) / 8


@pytest.mark.parametrize("ranks", [16, 64])
def test_operations_grow_with_units_and_ranks(monkeypatch, ranks):
    """A bound on the work, whatever the machine: how often pairs are counted. Tokens are never looked at one by one."""
    calls, before = [], Workload.before
    monkeypatch.setattr(Workload, "before", lambda self, position: (calls.append(1), before(self, position))[1])
    seq_len = ranks * 16384
    work = Workload.of([corpus(seq_len)], seq_len, 512)
    list(assignment.assign(work, equal(seq_len, ranks), ranks, [assignment.Aim()], 512))
    assert len(calls) <= 50 * ranks
