"""Means, paired intervals, and the cost at which an arm is as good as dense."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided 95 % interval by Student's t; None with one value."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_above_zero(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def is_below_zero(self) -> bool:
        return self.high is not None and self.high < 0


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; None with one value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float]) -> Interval:
    mean, error = statistics.fmean(values), standard_error(values)
    if error is None:
        return Interval(mean, None, None)
    reach = float(student_t.ppf(0.975, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def paired(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Interval | None:
    """Return the interval of the differences, seed by seed; None if no seed is in both."""
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def cost_to_reach(points: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """Return the lowest cost at which the line through (cost, accuracy) reaches ``wanted``.

    The line joins the points by their costs. None if it is never reached. Where the cheapest point
    has reached it already, its cost is an upper bound and is returned.
    """
    ordered = sorted(points)
    if not ordered:
        return None
    before_cost, before = ordered[0]
    if before >= wanted:
        return before_cost
    for cost, accuracy in ordered[1:]:
        if accuracy >= wanted:
            share = (wanted - before) / (accuracy - before)
            return before_cost + share * (cost - before_cost)
        before_cost, before = cost, accuracy
    return None
