"""Rows and the report that prints them."""

from math import inf, nan

import pytest

from distflash.differences import Report, Row


def row(name, error, bound=1.0):
    return Row("gradient", name, error, error, 10.0, bound)


@pytest.mark.parametrize(
    ("error", "bound", "ok", "excess"), [(1.0, 1.0, True, 1.0), (2.0, 1.0, False, 2.0), (nan, 1.0, False, inf),
                                         (0.0, nan, False, inf), (0.0, 0.0, True, 0.0), (1.0, 0.0, False, inf)]
)  # fmt: skip
def test_a_row_is_judged_by_its_bound(error, bound, ok, excess):
    found = row("weight", error, bound)
    assert (found.ok, found.excess) == (ok, excess)


def test_a_report_shows_the_largest_errors_first_and_counts_the_rest():
    report = Report(tuple(row(f"w{n}", n / 20) for n in range(25)), first="blocks.3", notes=("a note",))
    text = str(report)
    assert not report.ok and report.worst.name == "w24"
    assert text.splitlines()[:2] == [
        "NOT VERIFIED: 4 of 25 values differ",
        "first layer that differs: blocks.3",
    ]
    assert text.index("w24") < text.index("w23") and "w14 " not in text
    assert "and 15 more" in text and text.endswith("note: a note")
    with pytest.raises(ValueError, match="NOT VERIFIED"):
        report.require()


def test_a_verified_report_is_a_table_of_few_lines():
    report = Report(tuple(row(f"w{n}", n / 30) for n in range(25)), notes=("a note",))
    lines = str(report).splitlines()
    assert report.ok and len(lines) == 8
    assert lines[0].startswith("verified: sharded and unsharded agree in 25 values; the largest error is 0.80 of its")
    assert [line.split()[1] for line in lines[2:5]] == ["w24", "w23", "w22"] and "and 22 more" in lines[5]


def test_a_value_that_is_not_finite_is_never_verified():
    assert Report((row("w", 0.0),)).ok
    assert not Report((row("w", 0.0),), not_finite="blocks.0").ok
