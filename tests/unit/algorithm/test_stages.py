"""Schedule, gate, loss and difficulty, each against something plainer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from regate_ds.algorithm.difficulty import update_difficulty
from regate_ds.algorithm.gate import keep, restore
from regate_ds.algorithm.loss import CHUNK, summed_loss, token_losses
from regate_ds.algorithm.schedule import Schedule
from regate_ds.algorithm.select import plan_dense, plan_sparse
from tests.models import random_batch


def test_the_papers_cycle_processes_the_share_that_it_states():
    schedule = Schedule(
        total_steps=1280, warmup_steps=0, cycle_steps=128, cycle_dense_steps=16, final_dense_steps=0
    )
    assert schedule.expected_share(0.5) == 0.5625


def test_warm_up_cycles_and_the_final_block_are_dense():
    schedule = Schedule(
        total_steps=20, warmup_steps=2, cycle_steps=5, cycle_dense_steps=1, final_dense_steps=3
    )
    dense = [step for step in range(20) if schedule.is_dense(step)]
    assert dense == [0, 1, 2, 7, 12, 17, 18, 19]


def test_restore_puts_kept_results_back_and_leaves_the_rest():
    _, batch = random_batch([[14], [6, 5]], seed=1)
    score_N = torch.rand(int(batch.is_label_BT.sum()))
    plan = plan_sparse(batch, score_N, keep_share=0.3, align="predictor", token_multiple=4)
    x_BTH = torch.randn(2, 14, 3, requires_grad=True)
    out = restore(x_BTH, keep(x_BTH, plan) * 2, plan)
    kept = torch.zeros(2 * 14, dtype=torch.bool)
    kept[plan.position_R] = True
    expected = torch.where(kept.view(2, 14, 1), x_BTH * 2, x_BTH)
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.sum(), x_BTH)
    assert torch.equal(gradient, torch.where(kept.view(2, 14, 1), 2.0, 1.0).expand_as(gradient))


def test_a_dense_plan_makes_the_gate_return_its_input_itself():
    _, batch = random_batch([[9]], seed=1)
    x_BTH = torch.randn(1, 9, 3)
    assert keep(x_BTH, plan_dense(batch)) is x_BTH


@pytest.mark.parametrize("num_targets", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("has_bias", [False, True])
def test_summed_loss_and_its_gradients_are_those_of_cross_entropy(num_targets: int, has_bias: bool):
    torch.manual_seed(0)
    leaves = [torch.randn(num_targets, 6), torch.randn(11, 6), torch.randn(11)]
    hidden, weight, bias = (x.double().requires_grad_() for x in leaves)
    targets = torch.randint(11, (num_targets,))
    used = bias if has_bias else None
    inputs = [hidden, weight, bias] if has_bias else [hidden, weight]
    expected = F.cross_entropy(F.linear(hidden, weight, used), targets, reduction="none")
    total, losses = summed_loss(hidden, weight, used, targets)
    assert torch.allclose(losses, expected.detach(), atol=1e-12)
    wanted = torch.autograd.grad(3 * expected.sum(), inputs)
    for found, want in zip(torch.autograd.grad(3 * total, inputs), wanted, strict=True):
        assert torch.allclose(found, want, atol=1e-11)


def test_token_losses_take_any_weights_of_the_user():
    torch.manual_seed(0)
    hidden = torch.randn(CHUNK + 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(11, (CHUNK + 3,)), torch.rand(CHUNK + 3).double()
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    losses = token_losses(hidden, weight, None, targets)
    wanted = torch.autograd.grad((expected * weights).sum(), [hidden, weight])
    found = torch.autograd.grad((losses * weights).sum(), [hidden, weight])
    for mine, want in zip(found, wanted, strict=True):
        assert torch.allclose(mine, want, atol=1e-11)


def test_bf16_heads_give_losses_in_fp32():
    hidden, weight = torch.randn(5, 6).bfloat16(), torch.randn(11, 6).bfloat16()
    _, losses = summed_loss(hidden, weight, None, torch.randint(11, (5,)))
    assert losses.dtype == torch.float32


def test_difficulty_is_a_moving_average_without_bias_correction():
    old, loss = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])
    found = update_difficulty(old, loss, decay=0.9)
    assert torch.allclose(found, 0.9 * old + 0.1 * loss)
