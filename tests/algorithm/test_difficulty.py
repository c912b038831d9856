"""The moving average, by its formula and over several sights."""

from __future__ import annotations

import pytest
import torch

from regate_ds.algorithm.difficulty import update_difficulty


def test_difficulty_is_a_moving_average_without_bias_correction():
    old, loss = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])
    assert torch.allclose(update_difficulty(old, loss, decay=0.9), 0.9 * old + 0.1 * loss)


def test_sights_weigh_less_the_longer_ago_they_are():
    value = torch.zeros(1)
    for loss in (4.0, 2.0, 1.0):
        value = update_difficulty(value, torch.tensor([loss]), decay=0.5)
    assert value.item() == 0.5 * 1.0 + 0.25 * 2.0 + 0.125 * 4.0


def test_without_memory_it_is_the_last_loss():
    loss = torch.rand(5)
    assert torch.equal(update_difficulty(torch.rand(5), loss, decay=0.0), loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_difficulty_stays_in_fp32_whatever_the_losses_are(dtype: torch.dtype):
    found = update_difficulty(torch.zeros(2), torch.ones(2, dtype=dtype), decay=0.9)
    assert found.dtype == torch.float32
