"""The benchmark's arithmetic against numbers worked out by hand."""

from __future__ import annotations

import pytest

from regate_ds.recipe.learning.statistics import cost_to_reach, interval, paired, standard_error


def test_an_interval_is_students_t_around_the_mean():
    # Deviations -1, 0, 1: standard deviation 1, error 1 / sqrt(3); t at 2 degrees is 4.302653.
    found = interval([1.0, 2.0, 3.0])
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(0.5773502692)
    assert found.mean == 2.0
    assert found.low == pytest.approx(2.0 - 4.302653 * 0.5773502692, abs=1e-5)
    assert found.high == pytest.approx(2.0 + 4.302653 * 0.5773502692, abs=1e-5)
    assert not found.is_above_zero
    assert not found.is_below_zero
    assert interval([1.0, 1.01, 0.99]).is_above_zero
    assert interval([-1.0, -1.01, -0.99]).is_below_zero


def test_one_value_has_no_interval():
    found = interval([0.5])
    assert (found.mean, found.low, found.high) == (0.5, None, None)
    assert not found.is_above_zero
    assert standard_error([0.5]) is None


def test_differences_are_taken_seed_by_seed():
    found = paired({0: 0.5, 1: 0.7, 2: 0.9}, {2: 0.8, 1: 0.5, 7: 0.0})
    assert found is not None
    assert found.mean == pytest.approx(0.15)
    assert paired({0: 0.5}, {1: 0.5}) is None


@pytest.mark.parametrize(
    ("points", "wanted", "cost"),
    [
        # Half of the way from .40 to .44 at costs 2 and 4.
        ([(4.0, 0.44), (2.0, 0.40), (8.0, 0.50)], 0.42, 3.0),
        ([(2.0, 0.40), (4.0, 0.44)], 0.44, 4.0),
        # The first crossing counts, also where the line falls afterwards.
        ([(2.0, 0.40), (4.0, 0.44), (6.0, 0.41), (8.0, 0.50)], 0.42, 3.0),
        ([(2.0, 0.40), (4.0, 0.44)], 0.45, None),
        ([(2.0, 0.46), (4.0, 0.50)], 0.45, 2.0),
        ([], 0.45, None),
    ],
)
def test_the_cost_at_which_a_line_crosses(points: list, wanted: float, cost: float | None):
    found = cost_to_reach(points, wanted)
    assert found is None if cost is None else found == pytest.approx(cost)
