"""Selection against a plain reading of the rules, sample by sample."""

from __future__ import annotations

import math
import random

import pytest
import torch

from regate_ds.algorithm.batch import ALWAYS, ELIDABLE, IGNORE, TokenBatch
from regate_ds.algorithm.select import ElisionPlan, fuse_scores, plan_dense, plan_sparse
from tests.models import random_batch

ROWS = [[20], [13, 4, 5], [7, 11], [30]]


def samples(batch: TokenBatch):
    """(row, positions) of each sample."""
    for r, row in enumerate(batch.segment_BT.tolist()):
        for s in range(max(row) + 1):
            yield r, [t for t, segment in enumerate(row) if segment == s]


def expected(batch: TokenBatch, score_N, keep_share: float, align: str) -> list[set[int]]:
    """Kept positions of each row, chosen one by one in order of the score."""
    score_BT = batch.at_labels(score_N)
    kept: list[set[int]] = [set() for _ in batch.keys]
    for r, positions in samples(batch):
        elidable = [t for t in positions if batch.kind_BT[r, t] == ELIDABLE]
        stay = {t for t in positions if batch.kind_BT[r, t] == ALWAYS}
        order = sorted(elidable, key=lambda t, r=r: (-float(score_BT[r, t]), t))
        k = math.ceil(keep_share * len(elidable) - 1e-9)
        hard: list[int] = []
        if align in ("predictor", "both"):
            hard = order[:k]
        if align == "both":
            hard = hard + [t + 1 for t in hard if t + 1 in elidable]
        if align == "target":
            hard = [t + 1 for t in order if t + 1 in elidable][:k]
            rest = [t for t in order if t not in hard]
            hard = hard + rest[: k - len(hard)]
        kept[r] |= stay | set(hard)
    return kept


def kept_sets(plan: ElisionPlan) -> list[set[int]]:
    sets: list[set[int]] = [set() for _ in range(len(plan.kept_BK))]
    for flat in plan.position_R.tolist():
        sets[flat // plan.num_tokens].add(flat % plan.num_tokens)
    return sets


@pytest.mark.parametrize("align", ["predictor", "target", "both"])
@pytest.mark.parametrize("keep_share", [0.01, 0.3, 0.5, 1.0])
def test_the_plan_keeps_what_a_plain_walk_over_each_sample_keeps(align: str, keep_share: float):
    for seed in range(8):
        _, batch = random_batch(ROWS, seed=seed)
        # Few distinct values, so that ties are common.
        score_N = torch.randint(0, 4, (int(batch.is_label_BT.sum()),)).float()
        plan = plan_sparse(batch, score_N, keep_share=keep_share, align=align)
        assert kept_sets(plan) == expected(batch, score_N, keep_share, align)


def test_slots_are_in_reading_order_and_padding_comes_last():
    _, batch = random_batch(ROWS, seed=3)
    plan = plan_sparse(
        batch, torch.rand(int(batch.is_label_BT.sum())), keep_share=0.5, align="both"
    )
    for row, segments in zip(plan.kept_BK.tolist(), plan.segment_BK.tolist(), strict=True):
        real = [t for t, s in zip(row, segments, strict=True) if s >= 0]
        assert real == sorted(real)
        assert segments[len(real) :] == [-1] * (len(row) - len(real))


def test_rows_are_filled_with_the_next_best_up_to_the_multiple():
    _, batch = random_batch([[40], [33]], seed=1)
    score_N = torch.rand(int(batch.is_label_BT.sum()))
    plan = plan_sparse(batch, score_N, keep_share=0.5, align="predictor")
    filled = plan_sparse(batch, score_N, keep_share=0.5, align="predictor", token_multiple=8)
    assert filled.num_slots % 8 == 0
    assert filled.num_filled == filled.num_kept - plan.num_kept > 0
    score_BT = batch.at_labels(score_N)
    for r, (few, many) in enumerate(zip(kept_sets(plan), kept_sets(filled), strict=True)):
        assert few <= many
        left = [
            float(score_BT[r, t]) for t in range(40) if batch.is_label_BT[r, t] and t not in many
        ]
        added = [float(score_BT[r, t]) for t in many - few]
        assert not added or not left or min(added) >= max(left)


def test_the_loss_runs_on_every_kept_label_and_only_there():
    _, batch = random_batch(ROWS, seed=5)
    score_N = torch.rand(int(batch.is_label_BT.sum()))
    plan = plan_sparse(batch, score_N, keep_share=0.5, align="predictor")
    labels = batch.labels_BT.reshape(-1)
    assert plan.targets_L.tolist() == labels[plan.label_position_L].tolist()
    in_plan = {p for p in plan.position_R.tolist() if labels[p] != IGNORE}
    assert set(plan.label_position_L.tolist()) == in_plan


def test_a_dense_plan_keeps_every_position_where_it_is():
    _, batch = random_batch(ROWS, seed=2)
    plan = plan_dense(batch)
    assert plan.is_dense
    assert plan.num_slots == plan.num_tokens
    assert plan.num_targets == int(batch.is_label_BT.sum())


def test_scores_that_are_not_finite_are_refused():
    _, batch = random_batch([[12]], seed=0)
    score_N = torch.full((int(batch.is_label_BT.sum()),), math.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        plan_sparse(batch, score_N, keep_share=0.5, align="predictor")


def test_both_fusions_follow_their_formulas():
    reference, difficulty = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    added = fuse_scores(reference, difficulty, reference_weight=0.5, fusion="additive")
    blended = fuse_scores(reference, difficulty, reference_weight=0.25, fusion="convex")
    assert added.tolist() == [2.0, 3.0]
    assert blended.tolist() == [1.25, 2.25]


def test_any_division_into_runs_adds_up_to_all_slots():
    rng = random.Random(0)
    for _ in range(20):
        rows = [[rng.randrange(3, 12) for _ in range(rng.randrange(1, 4))] for _ in range(3)]
        _, batch = random_batch(rows, seed=rng.randrange(100))
        score_N = torch.rand(int(batch.is_label_BT.sum()))
        plan = plan_sparse(batch, score_N, keep_share=0.4, align="target")
        assert sum(plan.run_lengths) == plan.segment_BK.numel()
