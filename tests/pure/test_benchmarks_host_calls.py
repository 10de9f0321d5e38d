"""Counts of Python calls, and the check against committed counts."""

import sys
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks import host_calls, stub
from benchmarks.host_calls import Calls, Row

ROW = Row("hopper", "2", "forward", 100)


def inner():
    return 1


def outer():
    return inner() + inner()


def test_functions_are_counted_by_name():
    with Calls() as calls:
        outer()
        len("no Python function")
    assert {place.split(":")[1]: n for place, n in calls.found.items()} == {"outer": 1, "inner": 2}
    assert sys.getprofile() is None


def test_a_count_is_the_same_twice_or_refused():
    ran = []

    def changes():
        ran.append(1)
        for _ in range(len(ran)):
            inner()

    assert host_calls.count(outer).total() == 3
    with pytest.raises(AssertionError, match="not the same twice"):
        host_calls.count(changes)


def test_only_counts_above_the_table_are_faults():
    table = {ROW.name: 100}
    assert not host_calls.faults([ROW], table) and not host_calls.faults([replace(ROW, calls=99)], table)
    (more,) = host_calls.faults([replace(ROW, calls=101)], table)
    assert "101" in more and "100" in more
    (missing, new) = host_calls.faults([replace(ROW, kernel="other")], table)
    assert "not counted any more" in missing and "not in the table" in new


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(host_calls, "TABLE", tmp_path / "table.json")
    host_calls.write_table([ROW, replace(ROW, ranks="1")])
    assert host_calls.read_table() == {ROW.name: 100, replace(ROW, ranks="1").name: 100}


def test_the_committed_table_has_every_kernel():
    assert {name.split(",")[0] for name in host_calls.read_table()} == set(stub.KERNELS)


def test_the_command_fails_above_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host_calls, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(stub, "KERNELS", {"hopper": None})
    monkeypatch.setattr(sys, "argv", ["host_calls", "--check"])
    monkeypatch.setattr(host_calls, "measure", lambda name: ([ROW], Counter()))
    host_calls.write_table([ROW])
    assert host_calls.main() == 0
    host_calls.write_table([replace(ROW, calls=ROW.calls - 1)])
    assert host_calls.main() == 1
    assert f"too many: {ROW.name}: 100 calls of Python functions, 99 in the table" in capsys.readouterr().err
