"""Neighbours become one slot: patch-level training (Shao et al., arXiv 2407.12665).

The tokens of a text run are cut into patches of ``size``; the last one of a run may be shorter. A
patch never holds tokens of two samples, nor of prompt and answer, and each position of an image is
a patch of its own. What the decoder reads of a patch is the mean of its tokens' embeddings, at the
patch's number in its sample; what its output predicts is every answer token of the next patch, each
with the same weight. The answer tokens of a sample's first patch are predicted by none.

This is a phase of a run, before the execution that the configuration names (``MergeConfig``).

Shapes: B rows, T positions, K slots of a row, S = B * K slots, M positions of a slot, L targets, U
slots that predict something, H hidden.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch, starts_segment
from regate_ds.algorithm.executions.patches import Patches
from regate_ds.algorithm.plan import ElisionPlan, Slots, assemble_plan, run_lengths_of
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.select import follows_in_sample, shift_left, shift_right


def plan_merged_window(
    window: Sequence[TokenBatch], rows: RowLayout, *, size: int
) -> tuple[ElisionPlan, ...]:
    """Return the plan of each micro-batch in a merged step; ``size`` tokens are a patch.

    rows: what the lengths of rows must be.
    """
    multiple = rows.slot_multiple
    starts = [_starts_patch(batch, size) for batch in window]
    lengths = [math.ceil(_longest(starts_BT) / multiple) * multiple for starts_BT in starts]
    if rows.equal:
        lengths = [max(lengths)] * len(lengths)
    return tuple(
        replace(_plan(batch, starts_BT, size, length), micro=number)
        for number, (batch, starts_BT, length) in enumerate(
            zip(window, starts, lengths, strict=True)
        )
    )


def plan_patches(batch: TokenBatch, *, size: int) -> ElisionPlan:
    """Return a plan whose slots are the patches of a micro-batch, with no more than are needed."""
    starts_BT = _starts_patch(batch, size)
    return _plan(batch, starts_BT, size, _longest(starts_BT))


def _plan(batch: TokenBatch, starts_BT: Tensor, size: int, num_slots: int) -> ElisionPlan:
    """Return the plan of patches that start there; slots of a row without one are padding."""
    is_real_BT, num_rows = batch.segment_BT >= 0, len(starts_BT)
    slot_BT = (starts_BT.long().cumsum(1) - 1).clamp(min=0)
    flat_BT = slot_BT + num_slots * torch.arange(num_rows)[:, None]
    position_P = is_real_BT.reshape(-1).nonzero().squeeze(1)
    slot_P = flat_BT.reshape(-1)[position_P]
    start_P = _latest(starts_BT).reshape(-1)[position_P]
    nth_P = position_P % batch.labels_BT.shape[1] - start_P
    member_SM = torch.zeros(num_rows * num_slots, size, dtype=torch.int64)
    member_SM[slot_P, nth_P] = position_P
    is_member_SM = torch.zeros_like(member_SM, dtype=torch.bool)
    is_member_SM[slot_P, nth_P] = True
    segment_S = batch.segment_BT.reshape(-1)[member_SM[:, 0]]
    segment_BK = segment_S.masked_fill(~is_member_SM[:, 0], -1).view(num_rows, num_slots)
    position_L, slot_L = _targets(batch, slot_BT, num_slots)
    slots = Slots(
        kept_BK=torch.arange(num_slots).expand(num_rows, -1),
        segment_BK=segment_BK,
        label_slot_L=slot_L,
        targets_L=batch.labels_BT.reshape(-1)[position_L],
    )
    plan = assemble_plan(
        slots,
        num_tokens=num_slots,
        moves_rows=False,
        is_packed=any(len(row) > 1 for row in batch.keys),
        token_run_lengths=run_lengths_of(segment_BK),
    )
    return with_patches(
        plan, member_SM, is_member_SM, position_L, row_length=batch.labels_BT.shape[1]
    )


def with_patches(
    plan: ElisionPlan,
    member_SM: Tensor,
    is_member_SM: Tensor,
    position_L: Tensor,
    *,
    row_length: int,
) -> ElisionPlan:
    """Return the plan whose slots have these positions, and whose targets are the labels there."""
    latest_BK = _latest(starts_segment(plan.segment_BK))
    patches = Patches(
        row_length=row_length,
        member_SM=member_SM,
        is_member_SM=is_member_SM,
        place_BK=torch.arange(plan.num_slots) - latest_BK,
        **_cells(plan.label_slot_L, member_SM.shape[1]),
    )
    first_R = member_SM[plan.slot_R, 0]
    return replace(plan, position_R=first_R, label_position_L=position_L, patches=patches)


def mean_of_members(x_BTH: Tensor, plan: ElisionPlan) -> Tensor:
    """Return the mean over the positions of each slot, [B, K, H]; 0 in slots of padding."""
    assert plan.patches is not None
    member_SM, is_member_SM = plan.patches.member_SM, plan.patches.is_member_SM
    hidden = x_BTH.shape[-1]
    x_SMH = x_BTH.reshape(-1, hidden).index_select(0, member_SM.reshape(-1))
    share_SM = is_member_SM / is_member_SM.sum(dim=1, keepdim=True).clamp(min=1)
    mean_SH = torch.bmm(
        share_SM.to(x_BTH.dtype)[:, None], x_SMH.view(*member_SM.shape, hidden)
    ).squeeze(1)
    return mean_SH.view(len(x_BTH), -1, hidden)


def _longest(starts_BT: Tensor) -> int:
    """Return the patches of the longest row, at least one."""
    return max(1, int(starts_BT.sum(dim=1).max()))


def _starts_patch(batch: TokenBatch, size: int) -> Tensor:
    """Mark the first position of each patch."""
    follows_BT = follows_in_sample(batch)
    # The token at t + 1 belongs to an answer where t has a label.
    is_answer_BT = shift_right(batch.is_label_BT, False) & follows_BT
    starts_BT = starts_segment(batch.segment_BT)
    starts_BT |= is_answer_BT != (shift_right(is_answer_BT, False) & follows_BT)
    if batch.image_BT is not None:
        is_image_BT = batch.image_BT >= 0
        starts_BT |= is_image_BT | shift_right(is_image_BT, False)
    nth_BT = torch.arange(starts_BT.shape[1]) - _latest(starts_BT)
    return (batch.segment_BT >= 0) & (nth_BT % size == 0)


def _latest(starts_BT: Tensor) -> Tensor:
    """Return for each position the latest marked one of its row, itself included; 0 before it."""
    position_T = torch.arange(starts_BT.shape[1])
    return torch.where(starts_BT, position_T, 0).cummax(dim=1).values


def _targets(batch: TokenBatch, slot_BT: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Return the positions whose labels are predicted, flat in [B * T], and for each the slot."""
    has_next_BT = shift_left(follows_in_sample(batch), False)
    # A label behind the end of its sample would be the first token of one more patch.
    by_BT = torch.where(has_next_BT, shift_left(slot_BT, 0) - 1, slot_BT)
    first_BT = slot_BT.gather(1, _latest(starts_segment(batch.segment_BT)))
    has_slot_BT = batch.is_label_BT & (by_BT >= first_BT)
    position_L = has_slot_BT.reshape(-1).nonzero().squeeze(1)
    flat_BT = by_BT + num_slots * torch.arange(len(by_BT))[:, None]
    return position_L, flat_BT.reshape(-1)[position_L]


def _cells(slot_L: Tensor, size: int) -> dict[str, Tensor]:
    """Return the fields of ``Patches`` that say which slot predicts each target."""
    predicts_U, number_L = slot_L.unique_consecutive(return_inverse=True)
    start_L = torch.ones_like(slot_L, dtype=torch.bool)
    start_L[1:] = slot_L[1:] != slot_L[:-1]
    nth_L = torch.arange(len(slot_L)) - _latest(start_L[None])[0]
    return {"predicts_U": predicts_U, "cell_L": number_L * size + nth_L}
