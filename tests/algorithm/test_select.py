"""Selection against a plain walk over the samples, and the fields of a plan."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.plan import ElisionPlan, plan_dense
from regate_ds.algorithm.quotas.quota import share_of
from regate_ds.algorithm.rows import widen
from tests.algorithm.plain_plan_helper import (
    plain_kept,
    plain_ragged,
    rows_of,
    samples_of,
    wild_batch,
)
from tests.support.models import random_batch
from tests.support.planning import fuse, plan_ragged, plan_sparse

ALIGN = ["predictor", "target", "both"]


def scores(batch: TokenBatch, rng: random.Random) -> torch.Tensor:
    """Few distinct values, so that ties are common; losses below 0 cannot be, scores can."""
    return torch.tensor([rng.randrange(-1, 4) / 3 for _ in range(int(batch.is_label_BT.sum()))])


def one_row(labels: list[int]) -> TokenBatch:
    labels_BT = torch.tensor([labels])
    return TokenBatch(((("set", 0),),), torch.zeros_like(labels_BT), labels_BT)


@pytest.mark.parametrize("align", ALIGN)
@pytest.mark.parametrize("keep_share", [1e-6, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_plan_keeps_what_a_plain_walk_over_each_sample_keeps(align, keep_share, multiple):
    rng = random.Random(0)
    for _ in range(60):
        batch = wild_batch(rng)
        score_N = scores(batch, rng)
        plan = plan_sparse(
            batch, score_N, keep_share=keep_share, align=align, token_multiple=multiple
        )
        kept, num_filled = plain_kept(
            batch, score_N, keep_share=keep_share, align=align, multiple=multiple
        )
        assert (rows_of(plan), plan.num_filled) == (kept, num_filled)


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_a_ragged_plan_fills_the_length_of_all_rows_together(multiple: int):
    rng = random.Random(3)
    for _ in range(60):
        batch = wild_batch(rng)
        score_N, how = scores(batch, rng), {"keep_share": 0.3, "align": "predictor"}
        plan = plan_ragged(batch, score_N, **how, token_multiple=multiple)
        kept, num_filled = plain_ragged(batch, score_N, **how, multiple=multiple)
        assert (rows_of(plan), plan.num_filled) == (kept, num_filled)


@pytest.mark.parametrize("align", ["predictor", "target"])
def test_each_sample_keeps_exactly_k_of_its_elidable_positions(align: str):
    rng = random.Random(1)
    for share in (0.1, 0.25, 0.5, 0.75):
        batch = wild_batch(rng)
        rows = rows_of(plan_sparse(batch, scores(batch, rng), keep_share=share, align=align))
        for sample in samples_of(batch):
            kept = [t for t in sample.elidable if t in rows[sample.row]]
            assert len(kept) == math.ceil(share * len(sample.elidable) - 1e-9)


def test_k_does_not_exceed_what_the_share_says_where_the_product_is_whole():
    # .07 * 100 is 7.000000000000001 in floating point.
    assert share_of(torch.tensor([100, 0, 1, 3]), 0.07).tolist() == [7, 0, 1, 1]


def test_ties_go_to_the_earlier_position():
    batch = one_row([IGNORE, 5, 6, 7, 8, IGNORE])
    plan = plan_sparse(batch, torch.zeros(4), keep_share=0.5, align="predictor")
    assert rows_of(plan) == [[0, 1, 2, 5]]


def test_scores_that_differ_in_the_last_bit_are_no_tie():
    batch = one_row([IGNORE, 5, 6, IGNORE])
    score_N = torch.tensor([1.0, 1.0 + 2**-23])
    plan = plan_sparse(batch, score_N, keep_share=0.5, align="predictor")
    assert rows_of(plan) == [[0, 2, 3]]


def test_target_keeps_the_position_that_holds_the_hard_token():
    batch = one_row([IGNORE, 5, 6, 7, 8, IGNORE])
    score_N = torch.tensor([0.0, 9.0, 0.0, 0.0])
    kept = {
        align: rows_of(plan_sparse(batch, score_N, keep_share=0.25, align=align))[0]
        for align in ALIGN
    }
    assert kept == {"predictor": [0, 2, 5], "target": [0, 3, 5], "both": [0, 2, 3, 5]}


def test_target_passes_over_a_holder_that_stays_anyway():
    # The hardest target is held by position 5, which has no label and is always kept.
    batch = one_row([IGNORE, 5, 6, 7, 8, IGNORE])
    score_N = torch.tensor([0.0, 1.0, 2.0, 9.0])
    plan = plan_sparse(batch, score_N, keep_share=0.25, align="target")
    assert rows_of(plan) == [[0, 4, 5]]


def test_a_sample_of_labels_alone_keeps_its_first_position():
    batch = one_row([1, 2, 3, 4, 5])
    plan = plan_sparse(batch, torch.arange(5.0), keep_share=0.25, align="predictor")
    assert rows_of(plan) == [[0, 4]]
    assert plan.targets_L.tolist() == [1, 5]


def test_padding_is_never_kept_or_counted():
    _, batch = random_batch([[20], [8]], seed=0, length=30)
    score_N = torch.rand(int(batch.is_label_BT.sum()))
    for plan in (plan_dense(batch), plan_sparse(batch, score_N, keep_share=1.0, align="both")):
        assert plan.num_kept == 28
        assert plan.num_padded == plan.segment_BK.numel() - 28


def run_lengths(owners: list) -> tuple[int, ...]:
    return tuple(len(list(run)) for _, run in itertools.groupby(owners))


def labels_of(plan: ElisionPlan) -> torch.Tensor:
    """The label of each slot, flat."""
    labels = torch.full((plan.segment_BK.numel(),), IGNORE)
    labels[plan.label_slot_L] = plan.targets_L
    return labels


def assert_consistent(plan: ElisionPlan, batch: TokenBatch) -> None:
    """Every field says the same of each slot as the batch says of its position."""
    flat_segment, flat_labels = plan.segment_BK.flatten(), labels_of(plan)
    real = [i for i, s in enumerate(flat_segment.tolist()) if s >= 0]
    width = plan.num_tokens
    position = [i // plan.num_slots * width + int(plan.kept_BK.flatten()[i]) for i in real]
    assert plan.slot_R.tolist() == real
    assert plan.position_R.tolist() == position
    assert torch.equal(flat_segment[real], batch.segment_BT.flatten()[position])
    assert torch.equal(flat_labels[real], batch.labels_BT.flatten()[position])
    labelled = [i for i in real if int(flat_labels[i]) != IGNORE]
    assert plan.label_slot_L.tolist() == labelled
    assert plan.label_position_L.tolist() == [position[real.index(i)] for i in labelled]
    assert plan.targets_L.tolist() == flat_labels[labelled].tolist()
    owner = [(i // plan.num_slots, s) for i, s in enumerate(flat_segment.tolist())]
    assert plan.run_lengths == run_lengths(owner)
    owner = [(i // width, s) for i, s in enumerate(batch.segment_BT.flatten().tolist())]
    assert plan.token_run_lengths == run_lengths(owner)
    assert plan.is_packed == any(len(keys) > 1 for keys in batch.keys)


@pytest.mark.parametrize("multiple", [1, 8])
def test_all_fields_of_a_plan_agree_with_its_batch(multiple: int):
    rng = random.Random(2)
    for _ in range(40):
        batch = wild_batch(rng)
        sparse = plan_sparse(
            batch, scores(batch, rng), keep_share=0.5, align="both", token_multiple=multiple
        )
        assert sparse.num_slots % multiple == 0
        assert_consistent(sparse, batch)
        assert_consistent(plan_dense(batch), batch)


def test_rows_are_as_short_as_the_longest_allows():
    _, batch = random_batch([[40], [9]], seed=1)
    score_N = torch.rand(int(batch.is_label_BT.sum()))
    plan = plan_sparse(batch, score_N, keep_share=0.5, align="predictor")
    assert plan.num_slots == max(len(row) for row in rows_of(plan))
    assert plan.moves_rows


def test_a_row_without_labels_left_is_padded_up_to_the_multiple():
    batch = one_row([IGNORE, IGNORE, 5])
    plan = plan_sparse(batch, torch.ones(1), keep_share=1.0, align="predictor", token_multiple=8)
    assert (plan.num_slots, plan.num_padded, plan.num_filled) == (8, 5, 0)
    assert plan.kept_BK.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0]]
    assert plan.segment_BK.tolist() == [[0, 0, 0, -1, -1, -1, -1, -1]]


def test_a_dense_plan_keeps_every_position_where_it_is():
    _, batch = random_batch([[20], [13, 4]], seed=2)
    plan = plan_dense(batch)
    assert not plan.moves_rows
    assert torch.equal(plan.kept_BK, torch.arange(20).expand(2, -1))
    assert torch.equal(labels_of(plan).view(2, -1), batch.labels_BT)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(value: float):
    _, batch = random_batch([[12]], seed=0)
    score_N = torch.zeros(int(batch.is_label_BT.sum()))
    score_N[-1] = value
    with pytest.raises(RuntimeError, match="not finite"):
        plan_sparse(batch, score_N, keep_share=0.5, align="predictor")


def test_both_fusions_follow_their_formulas():
    reference, difficulty = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    added = fuse(reference, difficulty, reference_weight=0.5, fusion="additive")
    blended = fuse(reference, difficulty, reference_weight=0.25, fusion="convex")
    assert added.tolist() == [2.0, 3.0]
    assert blended.tolist() == [1.25, 2.25]


def test_the_ends_of_the_convex_fusion_are_student_only_and_reference_only():
    reference, difficulty = torch.rand(9), torch.rand(9)
    student = fuse(reference, difficulty, reference_weight=0.0, fusion="convex")
    teacher = fuse(reference, difficulty, reference_weight=1.0, fusion="convex")
    assert torch.equal(student, difficulty)
    assert torch.equal(teacher, reference)


def test_moving_a_plan_moves_its_tensors_and_keeps_the_rest():
    _, batch = random_batch([[12]], seed=0)
    plan = plan_dense(batch)
    moved = plan.to("meta")
    assert {x.device.type for x in vars(moved).values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert moved.run_lengths == plan.run_lengths


@pytest.mark.parametrize("more", [0, 1, 7])
def test_a_widened_plan_has_longer_rows_of_the_same_tokens(more: int):
    rng = random.Random(5)
    for _ in range(20):
        batch = wild_batch(rng)
        plan = plan_sparse(batch, scores(batch, rng), keep_share=0.5, align="predictor")
        wide = widen(plan, plan.num_slots + more)
        assert wide.num_slots == plan.num_slots + more
        assert wide.num_padded == plan.num_padded + more * len(batch.keys)
        assert (rows_of(wide), wide.num_filled) == (rows_of(plan), plan.num_filled)
        assert torch.equal(wide.targets_L, plan.targets_L)
        assert torch.equal(wide.label_position_L, plan.label_position_L)
        assert_consistent(wide, batch)


def test_a_dense_plan_is_not_widened():
    plan = plan_dense(one_row([1, 2, IGNORE]))
    assert widen(plan, 5) is plan
