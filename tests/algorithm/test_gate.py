"""Taking kept positions out and putting results back, against a walk over positions."""

from __future__ import annotations

import random

import torch

from regate_ds.algorithm.gate import keep, restore
from regate_ds.algorithm.plan import ElisionPlan, plan_dense
from tests.algorithm.plain_plan_helper import rows_of, wild_batch
from tests.support.models import random_batch
from tests.support.planning import plan_sparse


def random_plan(rng: random.Random) -> ElisionPlan:
    batch = wild_batch(rng)
    score_N = torch.rand(int(batch.is_label_BT.sum()))
    return plan_sparse(batch, score_N, keep_share=0.3, align="predictor", token_multiple=4)


def test_kept_positions_come_in_reading_order():
    rng = random.Random(0)
    for _ in range(20):
        plan = random_plan(rng)
        x_BTH = torch.randn(len(plan.kept_BK), plan.num_tokens, 3)
        packed = keep(x_BTH, plan)
        for r, row in enumerate(rows_of(plan)):
            assert torch.equal(packed[r, : len(row)], x_BTH[r, row])


def test_results_go_back_to_their_positions_and_the_rest_rides_along_with_its_gradient():
    rng = random.Random(1)
    for _ in range(20):
        plan = random_plan(rng)
        x_BTH = torch.randn(len(plan.kept_BK), plan.num_tokens, 3, requires_grad=True)
        out = restore(x_BTH, keep(x_BTH, plan) * 2, plan)
        factor = torch.ones_like(x_BTH)
        for r, row in enumerate(rows_of(plan)):
            factor[r, row] = 2.0
        assert torch.equal(out, x_BTH * factor)
        (gradient,) = torch.autograd.grad(out.sum(), x_BTH)
        assert torch.equal(gradient, factor)


def test_what_stands_in_padding_slots_reaches_nothing():
    _, batch = random_batch([[20], [7]])
    score_N = torch.rand(int(batch.is_label_BT.sum()))
    plan = plan_sparse(batch, score_N, keep_share=0.5, align="predictor")
    assert plan.num_padded
    x_BTH = torch.randn(len(plan.kept_BK), plan.num_tokens, 3)
    y_BKH = torch.randn(*plan.kept_BK.shape, 3)
    spoiled = y_BKH.masked_fill((plan.segment_BK < 0)[..., None], torch.nan)
    assert torch.equal(restore(x_BTH, y_BKH, plan), restore(x_BTH, spoiled, plan))


def test_a_dense_plan_makes_the_gate_return_its_input_itself():
    batch = wild_batch(random.Random(4))
    plan = plan_dense(batch)
    x_BTH = torch.randn(*batch.labels_BT.shape, 3)
    y_BTH = torch.randn_like(x_BTH)
    assert keep(x_BTH, plan) is x_BTH
    assert restore(x_BTH, y_BTH, plan) is y_BTH
