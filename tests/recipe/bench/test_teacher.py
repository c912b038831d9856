"""The teacher's benchmark, and the bytes that benchmarks count."""

from __future__ import annotations

import pytest
import torch

from regate_ds.recipe.bench.measures import LiveBytes, SavedBytes
from regate_ds.recipe.bench.teacher import TeacherCase, run_teacher_bench


def test_bytes_are_those_of_tensors_alive_at_once():
    given = torch.ones(1000)
    with LiveBytes() as live:
        first = given + 1
        view = given[:10].view(2, 5)
        del first
        second = given.double() * 2
    assert view.shape == (2, 5)
    # float64 of the cast and of the product; the first sum is gone, the view has no bytes.
    assert second.dtype == torch.float64
    assert live.peak == 2 * 8 * 1000


def test_a_result_in_place_is_counted_once():
    with LiveBytes() as live:
        made = torch.zeros(1000)
        made.add_(1)
        made.exp_()
    assert live.peak == 4 * 1000


def test_saved_bytes_are_those_of_layers_without_their_weights():
    layer, head = torch.nn.Linear(10, 20, bias=False), torch.nn.Linear(20, 5, bias=False)
    saved = SavedBytes([layer])
    with saved.watching():
        head(layer(torch.ones(3, 10)).relu())
    # The layer saves its input alone; what relu and head save is outside of it.
    assert saved.total == 4 * 3 * 10


def test_both_passes_of_the_teacher_agree_and_the_plain_one_holds_all_logits():
    case = TeacherCase(hidden=64, num_layers=1, vocabulary=5000, num_tokens=64, num_pairs=1)
    result = run_teacher_bench(case)
    assert result["largest_difference"] == pytest.approx(0.0, abs=1e-5)
    # The logits of 64 positions, and the logarithms of 63 that cross-entropy makes of them.
    logits, scored = 4 * 64 * 5000, 4 * 63 * 5000
    assert logits + scored <= result["peak_bytes"]["plain"] < 1.2 * (logits + scored)
    assert result["peak_bytes"]["ours"] < logits
