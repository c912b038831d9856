"""The benchmarks measure what they say; their figures are no matter of a test."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regate_ds.recipe.bench.harness import LiveBytes
from regate_ds.recipe.bench.step import BenchCase, run_bench
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


def test_both_passes_of_the_teacher_agree_and_the_plain_one_holds_all_logits():
    case = TeacherCase(hidden=64, num_layers=1, vocabulary=5000, num_tokens=64, num_pairs=1)
    result = run_teacher_bench(case)
    assert result["largest_difference"] == pytest.approx(0.0, abs=1e-5)
    # The logits of 64 positions, and the logarithms of 63 that cross-entropy makes of them.
    logits, scored = 4 * 64 * 5000, 4 * 63 * 5000
    assert logits + scored <= result["peak_bytes"]["plain"] < 1.2 * (logits + scored)
    assert result["peak_bytes"]["ours"] < logits


def test_a_steps_flops_are_those_that_torch_counts():
    # Rows are short against the matrices, so that attention, which torch counts without its causal
    # half, is a small part.
    case = BenchCase(
        hidden=64, num_layers=2, vocabulary=300, num_samples=2, num_tokens=16, num_pairs=1
    )
    counter = FlopCounterMode(display=False)
    with counter:
        rows = run_bench(case)["steps"]
    num_rounds = 2
    ours = num_rounds * sum(row["flops"] for row in rows.values())
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.03)
    ideal = [row["ideal_ratio"] for row in rows.values()]
    assert ideal[0] == 1.0
    assert min(ideal) == rows["answers 0.5, image 0.5, first_layer=0"]["ideal_ratio"] < 1.0
