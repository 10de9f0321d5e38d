"""A few of all combinations, in which any two values of different axes still occur together.

    @pytest.mark.covering(2, layout=[df.Contiguous(), df.Zigzag(), df.Striped()], dtype=DTYPES, world_size=[1, 2, 3, 4])
    def test_exact(layout, dtype, world_size): ...

runs 12 of the 24 combinations, and all of them with `--full`. So a fault is found that shows whenever two particular
values meet, whatever the others are. `covering(1, ...)` takes every value at least once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def covering(strength: int, axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each axis, in the order of `itertools.product`; the same in every run.

    strength: any so many values of different axes are together in one of them.
    """
    rows = list(product(*(range(len(axis)) for axis in axes)))
    groups = {row: set(combinations(enumerate(row), min(strength, len(axes)))) for row in rows}
    missing = set().union(*groups.values())
    # Greedy: of what covers most, that whose values were chosen least. Shuffled, since the first of equally good ones
    # would be those with the first values of all axes.
    random.Random(0).shuffle(rows)
    chosen, times = [], Counter[tuple[int, int]]()
    while missing:
        best = max(rows, key=lambda row: (len(groups[row] & missing), -sum(times[each] for each in enumerate(row))))
        chosen.append(best)
        times.update(enumerate(best))
        missing -= groups[best]
    return [tuple(axis[n] for axis, n in zip(axes, row, strict=True)) for row in sorted(chosen)]


def parametrize(metafunc: pytest.Metafunc) -> None:
    """What the marks of a test ask for: see above."""
    for mark in metafunc.definition.iter_markers("covering"):
        (strength,), axes = mark.args, list(mark.kwargs.values())
        rows = product(*axes) if metafunc.config.getoption("--full") else covering(strength, axes)
        metafunc.parametrize(list(mark.kwargs), list(rows), ids=name)


def name(value: object) -> str:
    """What a value is called in a test's name."""
    return str(getattr(value, "__name__", value))
