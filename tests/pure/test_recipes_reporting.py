"""The smoothed line of loss.png."""

import pytest

from distflash.recipes.reporting import smooth


def test_smoothing_neither_lags_behind_a_falling_loss_nor_moves_its_ends():
    falling = [5.0 - 0.1 * n for n in range(30)]
    assert smooth(falling) == pytest.approx(falling)  # a mean of the steps before would be above it everywhere


def test_smoothing_takes_the_mean_of_as_many_on_both_sides():
    values = [float(n * n % 7) for n in range(9)]
    means = [sum(values[n - k : n + k + 1]) / (2 * k + 1) for n, k in enumerate([0, 1, 2, 2, 2, 2, 2, 1, 0])]
    assert smooth(values, most=2) == pytest.approx(means)
    assert smooth([3.0]) == [3.0] and smooth([]) == []
