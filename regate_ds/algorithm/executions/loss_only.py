"""All positions are computed, and the loss runs on the chosen ones: selection without saving."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regate_ds.algorithm.batch import ELIDABLE, TokenBatch
from regate_ds.algorithm.executions.execution import Ranked, Span
from regate_ds.algorithm.plan import ElisionPlan, plan_loss
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.select import top


@dataclass(frozen=True, kw_only=True)
class LossOnly:
    """No row moves; labels that must stay and the hard targets have a loss."""

    @property
    def chooses(self) -> bool:
        return True

    def spans(self, first_layer: int, last_layer: int) -> tuple[Span, ...]:
        return ()

    def plan(self, batch: TokenBatch, ranked: Ranked, rows: RowLayout) -> ElisionPlan:
        return plan_loss(batch, hard_targets(batch, ranked))


def hard_targets(batch: TokenBatch, ranked: Ranked) -> Tensor:
    """Mark [B, T] the labels that have a loss: the hard ones, and those that are never elided."""
    is_elidable_BT = batch.kind_BT == ELIDABLE
    hard_BT = top([ranked.score_BT], is_elidable_BT, batch.sample_BT, ranked.num_hard_S)
    return hard_BT | (batch.is_label_BT & ~is_elidable_BT)
