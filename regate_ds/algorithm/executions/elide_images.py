"""Image tokens ride past the gated layers; unchosen answers stay in them, and only have no loss.

What an answer's words stand on stays whole, as it is when the model is used. Where images fill most
of a sequence, this costs little beside ``elide``.
"""

from __future__ import annotations

from dataclasses import dataclass

from regate_ds.algorithm.batch import ELIDABLE, TokenBatch
from regate_ds.algorithm.executions.elide import rows_with
from regate_ds.algorithm.executions.execution import Ranked, Span
from regate_ds.algorithm.executions.loss_only import hard_targets
from regate_ds.algorithm.plan import ElisionPlan, plan_loss
from regate_ds.algorithm.rows import RowLayout


@dataclass(frozen=True, kw_only=True)
class ElideImages:
    """Keep all but the image tokens that ``elide`` would leave out; the loss is ``loss_only``'s."""

    @property
    def chooses(self) -> bool:
        return True

    def spans(self, first_layer: int, last_layer: int) -> tuple[Span, ...]:
        return (Span(first=first_layer, last=last_layer),)

    def plan(self, batch: TokenBatch, ranked: Ranked, rows: RowLayout) -> ElisionPlan:
        if ranked.beyond_BT is None:
            return plan_loss(batch, hard_targets(batch, ranked))
        is_answer_BT = batch.kind_BT == ELIDABLE
        return rows_with(batch, is_answer_BT, ranked, rows, hard_targets(batch, ranked))
