"""Patches against a walk over the tokens of each sample, and their loss against one at a time."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.executions.merge import mean_of_members, plan_merged_window, plan_patches
from regate_ds.algorithm.executions.patch_loss import summed_patch_loss
from regate_ds.algorithm.loss import CHUNK, LogitChange, summed_loss, token_losses
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.rows import RowLayout
from tests.algorithm.plain_plan_helper import wild_batch
from tests.support.batches import random_batch
from tests.support.patches import plain_samples


def found_samples(plan: ElisionPlan) -> list[tuple[int, list[list[int]]]]:
    """(row, patches as flat positions) of each sample of the plan, in reading order."""
    assert plan.patches is not None
    found: dict[tuple[int, int], list[list[int]]] = {}
    for s, segment in enumerate(plan.segment_BK.flatten().tolist()):
        members = plan.patches.member_SM[s][plan.patches.is_member_SM[s]].tolist()
        assert (segment >= 0) == bool(members)
        if members:
            key = (s // plan.num_slots, segment)
            assert plan.patches.place_BK.flatten()[s] == len(found.get(key, []))
            found.setdefault(key, []).append(members)
    return [(row, patches) for (row, _), patches in found.items()]


def plain_targets(batch: TokenBatch, size: int) -> list[tuple[list[int], int]]:
    """(positions of the patch that predicts, position whose label it is), in reading order."""
    labels = batch.labels_BT.flatten().tolist()
    return [
        (patches[number], position)
        for _, patches, targets in plain_samples(batch, size)
        for number, position in targets
        if labels[position] != IGNORE
    ]


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4, 9])
def test_patches_and_their_targets_are_those_of_a_walk_over_the_tokens(size: int, images: bool):
    rng = random.Random(size)
    for _ in range(60):
        batch = wild_batch(rng, images=images)
        plan = plan_patches(batch, size=size)
        assert found_samples(plan) == [(r, p) for r, p, _ in plain_samples(batch, size)]
        assert plan.patches is not None
        member_SM, is_member_SM = plan.patches.member_SM, plan.patches.is_member_SM
        found = [
            (member_SM[slot][is_member_SM[slot]].tolist(), position)
            for slot, position in zip(
                plan.label_slot_L.tolist(), plan.label_position_L.tolist(), strict=True
            )
        ]
        assert found == plain_targets(batch, size)
        labels_P = batch.labels_BT.flatten()
        assert torch.equal(plan.targets_L, labels_P[plan.label_position_L])
        cells = plan.patches.cell_L
        assert torch.equal(plan.patches.predicts_U[cells // size], plan.label_slot_L)
        assert cells.unique().tolist() == cells.tolist()


def test_a_patch_holds_no_tokens_of_two_samples_turns_or_of_an_image():
    rng = random.Random(1)
    for _ in range(60):
        batch = wild_batch(rng, images=True)
        assert batch.image_BT is not None
        sample, image = batch.sample_BT.flatten(), batch.image_BT.flatten()
        holds = batch.is_label_BT.flatten().roll(1)
        for _, patches in found_samples(plan_patches(batch, size=5)):
            for members in patches:
                assert len(sample[members].unique()) == 1
                assert len(members) == 1 or bool((image[members] < 0).all())
                assert members == list(range(members[0], members[-1] + 1))
                first = members[0] == 0 or sample[members[0]] != sample[members[0] - 1]
                assert len(holds[members[first:]].unique()) <= 1


def test_slots_of_padding_hold_nothing_and_count_for_nothing():
    _, batch = random_batch([[21], [5]])
    plan = plan_patches(batch, size=4)
    assert plan.num_padded == plan.segment_BK.numel() - plan.num_kept > 0
    embedded_BTH = torch.randn(2, 21, 3)
    mean_BKH = mean_of_members(embedded_BTH, plan)
    assert not bool(mean_BKH[plan.segment_BK < 0].any())


def test_a_window_numbers_its_micro_batches_and_plans_go_to_a_device_whole():
    window = [random_batch([[9]], seed=n)[1] for n in range(3)]
    plans = plan_merged_window(window, RowLayout(), size=2)
    assert [plan.micro for plan in plans] == [0, 1, 2]
    moved = plans[0].to("meta")
    assert moved.patches is not None
    fields = vars(moved.patches).values()
    assert {x.device.type for x in fields if isinstance(x, Tensor)} == {"meta"}
    assert moved.patches.row_length == 9


def test_rows_have_the_lengths_that_ranks_can_cut():
    window = [random_batch([[n]], seed=n)[1] for n in (9, 22)]
    alone = plan_merged_window(window, RowLayout(), size=2)
    for rows, lengths in (
        (RowLayout(), [6, 12]),
        (RowLayout(multiple=5), [10, 15]),
        (RowLayout(multiple=5, equal=True), [15, 15]),
    ):
        plans = plan_merged_window(window, rows, size=2)
        assert [plan.num_slots for plan in plans] == lengths
        for mine, wanted in zip(plans, alone, strict=True):
            assert torch.equal(mine.position_R, wanted.position_R)
            assert torch.equal(mine.targets_L, wanted.targets_L)


def head(bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (
        torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in ((2 * CHUNK + 7, 6), (13, 6), (13,))
    )
    return hidden, weight, offset if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("change", [LogitChange(), LogitChange(scale=0.5, cap=3.0)])
def test_the_loss_of_several_targets_a_slot_is_the_sum_of_their_losses(
    bias: bool, change: LogitChange
):
    num_slots = 2 * CHUNK + 7
    _, batch = random_batch([[3 * num_slots]], seed=4)
    plan = plan_patches(batch, size=3)
    assert plan.patches is not None
    number_L = plan.patches.cell_L // 3
    targets_L = plan.targets_L % 13
    grads = []
    for merged in (True, False):
        hidden, *rest = head(bias)
        used = hidden[: len(plan.patches.predicts_U)]
        top1_L = torch.zeros_like(targets_L, dtype=torch.bool)
        how = {"with_entropy": True, "top1_L": top1_L}
        if merged:
            found = summed_patch_loss(used, *rest, targets_L, plan.patches, change, **how)
        else:
            found = summed_loss(used[number_L], *rest, targets_L, None, change, **how)
        (found[0] * 0.7).backward()
        grads.append([x.grad for x in (hidden, *rest) if x is not None])
        grads[-1] += [*found, top1_L.double()]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_that_loss_is_autograds_of_the_plain_formula():
    _, batch = random_batch([[30]], seed=2)
    plan = plan_patches(batch, size=4)
    assert plan.patches is not None
    hidden, weight, bias = head(bias=True)
    used, targets_L = hidden[: len(plan.patches.predicts_U)], plan.targets_L % 13
    given = (used, weight, bias, targets_L, plan.patches)
    (found,) = torch.autograd.grad(summed_patch_loss(*given)[0], weight)
    losses_L, _ = token_losses(used[plan.patches.cell_L // 4], weight, bias, targets_L)
    (wanted,) = torch.autograd.grad(losses_L.sum(), weight)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_is_refused():
    hidden, weight, bias = head(bias=False)
    _, batch = random_batch([[30]], seed=2)
    plan = plan_patches(batch, size=4)
    assert plan.patches is not None
    used = hidden[: len(plan.patches.predicts_U)]
    total, _, _ = summed_patch_loss(used, weight, bias, plan.targets_L % 13, plan.patches)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="summed_patch_loss goes backward once"):
        total.backward()
