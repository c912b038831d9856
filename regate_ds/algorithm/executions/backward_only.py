"""Every position is computed, and in gated layers those that are not kept have no gradient.

Others attend to their keys and values as to constants. The kept positions are those of ``elide``;
the loss runs on all labels, so that layers behind the gated ones, and the head, learn from each.
"""

from __future__ import annotations

from dataclasses import dataclass

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.execution import Ranked, Span
from regate_ds.algorithm.plan import ElisionPlan, with_all_labels
from regate_ds.algorithm.rows import RowLayout


@dataclass(frozen=True, kw_only=True)
class BackwardOnly(Elide):
    """Keep what ``elide`` keeps; in gated layers only the backward pass leaves the others out."""

    def spans(self, first_layer: int, last_layer: int) -> tuple[Span, ...]:
        return (Span(first=first_layer, last=last_layer, part="backward"),)

    def plan(self, batch: TokenBatch, ranked: Ranked, rows: RowLayout) -> ElisionPlan:
        return with_all_labels(super().plan(batch, ranked, rows), batch)
