"""The paper's execution: elided positions ride the residual stream past the gated layers.

Shapes: B rows, T positions, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from regate_ds.algorithm.batch import ALWAYS, ELIDABLE, TokenBatch
from regate_ds.algorithm.executions.execution import Span
from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.plan import ElisionPlan, plan_rows
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.select import follows_in_sample, kept_positions, shift_right, top

Align = Literal["predictor", "target", "both"]


@dataclass(frozen=True, kw_only=True)
class Elide:
    """Keep what must stay and, of each sample's label positions, those of the hardest targets."""

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

    def plan(
        self, batch: TokenBatch, score_BT: Tensor, num_hard_S: Tensor, rows: RowLayout
    ) -> ElisionPlan:
        keep_BT = (batch.kind_BT == ALWAYS) | self._aligned(batch, score_BT, num_hard_S)
        fill_BT = _fill(batch, keep_BT, score_BT, rows)
        kept_BK = kept_positions(keep_BT | fill_BT, rows.slot_multiple)
        return replace(plan_rows(batch, kept_BK), num_filled=int(fill_BT.sum()))

    def _aligned(self, batch: TokenBatch, score_BT: Tensor, num_hard_S: Tensor) -> Tensor:
        """Mark the elidable positions that each sample's hard targets keep."""
        is_elidable_BT, sample_BT = batch.kind_BT == ELIDABLE, batch.sample_BT
        # Position u holds the target of position u - 1, where that one is a label of its sample.
        holds_BT = shift_right(is_elidable_BT, False) & is_elidable_BT & follows_in_sample(batch)
        if self.align == "target":
            held_BT = torch.where(holds_BT, shift_right(score_BT, 0.0), score_BT)
            # Positions that hold no target come after all that do, ranked by their own score.
            return top([holds_BT, held_BT], is_elidable_BT, sample_BT, num_hard_S)
        hard_BT = top([score_BT], is_elidable_BT, sample_BT, num_hard_S)
        if self.align == "both":
            return hard_BT | (shift_right(hard_BT, False) & holds_BT)
        return hard_BT


def _fill(batch: TokenBatch, keep_BT: Tensor, score_BT: Tensor, rows: RowLayout) -> Tensor:
    """Mark the next-best label positions that bring rows, or the micro-batch, to a multiple."""
    row_BT = torch.arange(len(keep_BT))[:, None].expand_as(keep_BT)
    group_BT = row_BT if rows.fills_rows else torch.zeros_like(row_BT)
    missing_G = -torch.bincount(group_BT[keep_BT]) % rows.fill_multiple
    is_elidable_BT = batch.kind_BT == ELIDABLE
    return top([score_BT], is_elidable_BT & ~keep_BT, group_BT, missing_G)
