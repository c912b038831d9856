"""The paper's execution: elided positions ride the residual stream past the gated layers.

Shapes: B rows, T positions, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from regate_ds.algorithm.batch import ALWAYS, ELIDABLE, IMAGE, TokenBatch
from regate_ds.algorithm.executions.execution import Ranked, Span
from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.plan import ElisionPlan, plan_rows
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.select import follows_in_sample, kept_positions, shift_right, top

Align = Literal["predictor", "target", "both"]


@dataclass(frozen=True, kw_only=True)
class Elide:
    """Keep what must stay, of each sample's label positions those of the hardest targets, and of
    each image the first tokens in its order."""

    align: Align = "predictor"
    """Which position a hard target keeps: the one whose output predicts it, the one that holds it
    (`target`), or `both`."""

    def __post_init__(self) -> None:
        known = get_args(Align)
        refuse_knobs(self, lambda: [("align", self.align in known, f"must be one of {known}")])

    @property
    def chooses(self) -> bool:
        return True

    def spans(self, first_layer: int, last_layer: int) -> tuple[Span, ...]:
        return (Span(first=first_layer, last=last_layer),)

    def plan(self, batch: TokenBatch, ranked: Ranked, rows: RowLayout) -> ElisionPlan:
        keep_BT = self._aligned(batch, ranked.score_BT, ranked.num_hard_S)
        return rows_with(batch, keep_BT, ranked, rows)

    def _aligned(self, batch: TokenBatch, score_BT: Tensor, num_hard_S: Tensor) -> Tensor:
        """Mark the elidable positions that each sample's hard targets keep."""
        is_elidable_BT, sample_BT = batch.kind_BT == ELIDABLE, batch.sample_BT
        if self.align == "predictor":
            return top([score_BT], is_elidable_BT, sample_BT, num_hard_S)
        # Position u holds the target of position u - 1, where that one is a label of its sample.
        holds_BT = shift_right(is_elidable_BT, False) & is_elidable_BT & follows_in_sample(batch)
        if self.align == "both":
            hard_BT = top([score_BT], is_elidable_BT, sample_BT, num_hard_S)
            return hard_BT | (shift_right(hard_BT, False) & holds_BT)
        held_BT = torch.where(holds_BT, shift_right(score_BT, 0.0), score_BT)
        # Positions that hold no target come after all that do, ranked by their own score.
        return top([holds_BT, held_BT], is_elidable_BT, sample_BT, num_hard_S)


def rows_with(
    batch: TokenBatch,
    answer_BT: Tensor,
    ranked: Ranked,
    rows: RowLayout,
    target_BT: Tensor | None = None,
) -> ElisionPlan:
    """Keep these answer positions, what must stay, and the first tokens of each image; fill rows.

    target_BT: the labels that have a loss; None is all that are kept.
    """
    keep_BT = (batch.kind_BT == ALWAYS) | _kept_image(batch, ranked) | answer_BT
    fill_BT = _fill(batch, keep_BT, ranked, rows)
    if ranked.fills_rows and rows.row_format == "padded":
        fill_BT |= _level(batch, keep_BT | fill_BT, ranked)
    kept_BK = kept_positions(keep_BT | fill_BT, rows.slot_multiple)
    return replace(plan_rows(batch, kept_BK, target_BT), num_filled=int(fill_BT.sum()))


def _kept_image(batch: TokenBatch, ranked: Ranked) -> Tensor:
    """Mark the image tokens that a step keeps."""
    is_image_BT = batch.kind_BT == IMAGE
    return is_image_BT if ranked.beyond_BT is None else is_image_BT & (ranked.beyond_BT < 0)


def _fill(batch: TokenBatch, keep_BT: Tensor, ranked: Ranked, rows: RowLayout) -> Tensor:
    """Mark the positions that bring rows, or the micro-batch, to a multiple.

    First come the next-best label positions, then the next image tokens in their images' orders.
    """
    if rows.fill_multiple == 1:
        return torch.zeros_like(keep_BT)
    row_BT = torch.arange(len(keep_BT))[:, None].expand_as(keep_BT)
    group_BT = row_BT if rows.fills_rows else torch.zeros_like(row_BT)
    missing_G = -torch.bincount(group_BT[keep_BT]) % rows.fill_multiple
    is_label_BT = batch.kind_BT == ELIDABLE
    value_BT = ranked.score_BT
    if ranked.beyond_BT is not None:
        value_BT = torch.where(is_label_BT, value_BT, -ranked.beyond_BT.double())
    may_fill_BT = (is_label_BT | (batch.kind_BT == IMAGE)) & ~keep_BT
    return top([is_label_BT, value_BT], may_fill_BT, group_BT, missing_G)


def _level(batch: TokenBatch, keep_BT: Tensor, ranked: Ranked) -> Tensor:
    """Mark the image tokens that bring each row to the length of the longest, as far as there are.

    They are the next in their images' orders; answers keep the number that the quota says.
    """
    if ranked.beyond_BT is None:
        return torch.zeros_like(keep_BT)
    num_B = keep_BT.sum(dim=1)
    row_BT = torch.arange(len(keep_BT))[:, None].expand_as(keep_BT)
    may_fill_BT = (batch.kind_BT == IMAGE) & ~keep_BT
    return top([-ranked.beyond_BT], may_fill_BT, row_BT, num_B.max() - num_B)
