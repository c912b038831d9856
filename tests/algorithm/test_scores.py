"""Scores: what each makes of its inputs, and that it depends on nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from regate_ds.algorithm.scores.random import Random
from regate_ds.algorithm.scores.score import ScoreInputs
from regate_ds.algorithm.scores.table import SCORES

KEYS = (("a", 3), ("b", 3), ("a", 4))


def inputs(keys=KEYS, counts=(4, 7, 5), step: int = 2) -> ScoreInputs:
    return ScoreInputs(step=step, keys=keys, num_labels_S=torch.tensor(counts), statistics={})


def test_random_values_belong_to_the_sample_wherever_it_stands():
    first, second, third = Random()(inputs()).split([4, 7, 5])
    turned = Random()(inputs(KEYS[::-1], (5, 7, 4))).split([5, 7, 4])
    assert torch.equal(torch.cat([first, second, third]), torch.cat(turned[::-1]))


@pytest.mark.parametrize(
    ("score", "step"), [(Random(seed=1), 2), (Random(), 3)], ids=["another seed", "another step"]
)
def test_random_values_are_drawn_anew_for(score: Random, step: int):
    assert not torch.equal(score(inputs(step=step)), Random()(inputs()))


def test_random_values_spread_evenly_over_positions():
    keys = tuple(("set", n) for n in range(400))
    values = Random()(inputs(keys, (10,) * 400)).view(400, 10)
    # Standard error of a mean of 400 values, uniform in [0, 1], is .0144.
    assert bool(((values.mean(0) - 0.5).abs() < 0.06).all())


@pytest.mark.parametrize("name", SCORES)
def test_a_score_says_what_it_needs_and_gets_along_with_it(name: str):
    score = SCORES[name]()
    given = ScoreInputs(
        step=0,
        keys=KEYS,
        num_labels_S=torch.tensor([4, 7, 5]),
        reference_N=torch.rand(16) if score.needs_reference else None,
        statistics={one.name: torch.rand(16) for one in score.statistics},
    )
    values_N = score(given)
    assert values_N.shape == (16,)
    assert bool((values_N > -math.inf).all())


def test_a_window_without_labels_has_no_values():
    assert Random()(inputs((), ())).shape == (0,)
