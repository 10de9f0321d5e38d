from collections import Counter
from itertools import combinations, product

import pytest

from tests import pairs

SHAPES = [(3, 2, 4), (2, 2, 3, 2), (4, 4, 8), (5,), (1, 1), (2, 3, 1, 4, 2)]


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_values_are_together_in_one_combination(shape, strength):
    axes = [[f"{axis}{n}" for n in range(size)] for axis, size in zip("abcde", shape, strict=False)]
    rows = pairs.covering(strength, axes)
    assert len(set(rows)) == len(rows) and set(rows) <= set(product(*axes))
    for some in combinations(range(len(axes)), min(strength, len(axes))):
        assert {tuple(row[n] for n in some) for row in rows} == set(product(*(axes[n] for n in some)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_few_and_always_the_same(shape):
    axes = [range(n) for n in shape]
    two, one = sorted(shape)[-2:] if len(shape) > 1 else (1, *shape)
    assert len(pairs.covering(1, axes)) <= sum(shape) - len(shape) + 1
    assert one * two <= len(pairs.covering(2, axes)) <= 1.5 * one * two
    assert pairs.covering(2, axes) == pairs.covering(2, axes) == sorted(pairs.covering(2, axes))


def test_values_take_turns():
    counts = Counter(short for _, short in pairs.covering(1, [range(8), range(3)]))
    assert sorted(counts.values()) == [2, 3, 3]


def test_values_may_be_anything():
    """Equal values of an axis are one by one, and need no hash."""
    assert pairs.covering(2, [[[], []], [{}]]) == [([], {}), ([], {})]


@pytest.mark.covering(2, number=[1, 2, 3], letter=["a", "b"], kind=[int, str])
def test_a_mark_parametrizes_a_test(request, number, letter, kind):
    assert request.node.callspec.id == f"{number}-{letter}-{kind.__name__}"
    few = pairs.covering(2, [[1, 2, 3], ["a", "b"], [int, str]])
    assert len(few) == 6 and ((number, letter, kind) in few or request.config.getoption("--full"))
