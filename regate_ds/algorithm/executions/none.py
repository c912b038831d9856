"""No elision: the dense run that every other is measured against, with our head and our loss."""

from __future__ import annotations

from dataclasses import dataclass

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.executions.execution import Ranked, Span
from regate_ds.algorithm.plan import ElisionPlan, plan_dense
from regate_ds.algorithm.rows import RowLayout


@dataclass(frozen=True, kw_only=True)
class NoElision:
    """Every step is dense, whatever the shares say."""

    @property
    def chooses(self) -> bool:
        return False

    def spans(self, first_layer: int, last_layer: int) -> tuple[Span, ...]:
        return ()

    def plan(self, batch: TokenBatch, ranked: Ranked, rows: RowLayout) -> ElisionPlan:
        return plan_dense(batch)
