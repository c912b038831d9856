"""Quotas against a plain sort over lists, and the mean share of a moving threshold."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from regate_ds.algorithm.quotas.per_sample import PerSample
from regate_ds.algorithm.quotas.per_window import PerWindow
from regate_ds.algorithm.quotas.quota import Quota, QuotaState, Samples, alone
from regate_ds.algorithm.quotas.threshold import QUANTILE_STATE, Threshold
from regate_ds.algorithm.schedule import MovingShare


def wild(rng: random.Random) -> tuple[Tensor, Samples]:
    """Samples of 0 to 9 positions whose values tie often."""
    counts = [rng.randrange(10) for _ in range(rng.randrange(1, 7))]
    keys = [(rng.choice("ab"), n) for n in range(len(counts))]
    rng.shuffle(keys)
    values = [rng.randrange(5) / 4 for _ in range(sum(counts))]
    return torch.tensor(values, dtype=torch.float64), Samples(tuple(keys), torch.tensor(counts))


def count(
    quota: Quota, values_N: Tensor, samples: Samples, share: float, state: QuotaState | None = None
) -> tuple[list[int], QuotaState]:
    num_S, state = quota.count(
        values_N, samples, keep_share=share, exchange=alone, state=state or {}
    )
    return num_S.tolist(), state


def plain_per_window(values: Tensor, samples: Samples, share: float, floor: float) -> list[int]:
    key = [(PLAIN_NAMES.index(name), record) for name, record in samples.keys]
    rows = [
        (-value, key[sample], position, sample)
        for sample, part in enumerate(values.split(samples.num_S.tolist()))
        for position, value in enumerate(part.tolist())
    ]
    floors = [math.ceil(floor * n - 1e-9) for n in samples.num_S.tolist()]
    counts, left = list(floors), math.ceil(share * len(rows) - 1e-9) - sum(floors)
    passed = [0] * len(counts)
    for *_, sample in sorted(rows):
        passed[sample] += 1
        if passed[sample] > floors[sample] and left > 0:
            counts[sample] += 1
            left -= 1
    return counts


def _names_in_order() -> list[str]:
    """Data set names in the order in which ties go, which is by a hash."""
    pair = Samples((("a", 0), ("b", 0)), torch.tensor([1, 1]))
    counts, _ = count(PerWindow(), torch.zeros(2, dtype=torch.float64), pair, 0.5)
    return ["a", "b"] if counts == [1, 0] else ["b", "a"]


PLAIN_NAMES = _names_in_order()


@pytest.mark.parametrize("share", [1e-6, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("floor", [0.0, 0.25, 0.6])
def test_per_window_keeps_the_hardest_of_all_samples(share: float, floor: float):
    rng = random.Random(0)
    for _ in range(60):
        values_N, samples = wild(rng)
        found, _ = count(PerWindow(floor=floor), values_N, samples, share)
        assert found == plain_per_window(values_N, samples, share, floor)


def test_per_sample_keeps_the_same_share_of_each():
    samples = Samples((("a", 0), ("a", 1), ("a", 2)), torch.tensor([100, 0, 3]))
    assert count(PerSample(), torch.rand(103), samples, 0.07)[0] == [7, 0, 1]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_threshold_holds_the_mean_share_while_scores_drift(share: float):
    generator = torch.Generator().manual_seed(0)
    samples = Samples(tuple(("a", n) for n in range(8)), torch.full((8,), 40))
    state: QuotaState = {}
    shares = []
    for step in range(400):
        # Losses that fall, with a spread that falls along.
        scale = 4.0 * 0.99**step + 0.2
        values_N = scale * torch.rand(320, generator=generator, dtype=torch.float64)
        counts, state = count(Threshold(), values_N, samples, share, state)
        shares.append(sum(counts) / 320)
    assert abs(sum(shares) / len(shares) - share) < 0.01
    assert len({round(one, 3) for one in shares}) > 20


@pytest.mark.parametrize("between", ["line", "steps"])
def test_the_threshold_follows_a_share_that_moves(between: Any):
    path = MovingShare(points=((0.0, 0.7), (0.5, 0.3), (1.0, 0.3)), between=between)
    generator = torch.Generator().manual_seed(0)
    samples = Samples(tuple(("a", n) for n in range(8)), torch.full((8,), 40))
    state: QuotaState = {}
    off = []
    for step in range(200):
        values_N = torch.rand(320, generator=generator, dtype=torch.float64)
        share = path.at(step / 199)
        counts, state = count(Threshold(), values_N, samples, share, state)
        off.append(sum(counts) / 320 - share)
    assert abs(sum(off) / len(off)) < 0.01
    # Behind the jump, in step 100, the share is off by all of it, and soon it is not.
    assert abs(max(off) - (0.4 if between == "steps" else 0.0)) < 0.07
    assert all(abs(sum(off[start : start + 10]) / 10) < 0.03 for start in (0, 40, 80, 110, 190))


def test_the_threshold_starts_at_the_share_of_its_first_step():
    samples = Samples((("a", 0),), torch.tensor([10]))
    counts, state = count(Threshold(), torch.arange(10.0), samples, 0.3)
    assert counts == [3]
    # The mean of 0 to 9 is 4.5, their standard deviation 2.8723; 6 is the highest that is elided.
    assert state[QUANTILE_STATE] == pytest.approx((6.0 - 4.5) / 2.8723, abs=1e-3)


def test_a_sample_below_the_threshold_keeps_one_position_and_an_empty_one_none():
    samples = Samples((("a", 0), ("a", 1)), torch.tensor([5, 0]))
    assert count(Threshold(), torch.zeros(5), samples, 0.5, {QUANTILE_STATE: 9.0})[0] == [1, 0]


@pytest.mark.parametrize("quota", [PerSample(), PerWindow(), PerWindow(floor=0.3), Threshold()])
def test_a_window_without_labels_asks_for_none(quota: Quota):
    samples = Samples((("a", 0),), torch.tensor([0]))
    assert count(quota, torch.zeros(0, dtype=torch.float64), samples, 0.5)[0] == [0]


def test_positions_that_never_ran_come_first_and_do_not_move_the_threshold():
    samples = Samples((("a", 0), ("a", 1)), torch.tensor([2, 2]))
    values_N = torch.tensor([math.inf, 1.0, math.inf, 0.5], dtype=torch.float64)
    assert count(PerWindow(), values_N, samples, 0.5)[0] == [1, 1]
    counts, state = count(Threshold(), values_N, samples, 0.5)
    assert math.isfinite(state[QUANTILE_STATE])
    assert min(counts) >= 1


def test_a_threshold_waits_for_its_first_score():
    none = Samples((("a", 0),), torch.tensor([0]))
    empty = torch.zeros(0, dtype=torch.float64)
    assert count(Threshold(), empty, none, 0.1) == ([0], {})
    unseen = Samples((("a", 0),), torch.tensor([3]))
    assert count(Threshold(), torch.full((3,), math.inf).double(), unseen, 0.1) == ([3], {})


def test_scores_far_out_do_not_overflow_the_threshold():
    values_N = torch.full((1000,), 1e9, dtype=torch.float64)
    values_N[::2] = 0.0
    _, state = count(Threshold(), values_N, Samples((("a", 0),), torch.tensor([1000])), 0.5)
    assert math.isfinite(state[QUANTILE_STATE])


def test_a_sample_that_comes_twice_has_its_floor_twice():
    samples = Samples((("a", 0), ("a", 0)), torch.tensor([1, 1]))
    counts, _ = count(PerWindow(floor=0.5), torch.zeros(2, dtype=torch.float64), samples, 0.5)
    assert counts == [1, 1]
