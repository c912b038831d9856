"""All positions are computed and all labels have a loss, each weighed by its score: after CAL.

CAL (arXiv 2405.17871) clamps its value, the difference of a label's logits with and without the
image, to [1, 5], takes the mean of each position and its two neighbours, and divides the weighted
loss by the sum of the micro-batch's weights. Two things are ours: neighbours are label positions of
the same answer, and weights are divided by their mean over the sample, so that every sample counts
as without weights and ranks need not exchange anything.

Shapes: B rows, T positions, S samples, L label positions.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.executions.execution import Ranked, Span
from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.plan import ElisionPlan, plan_dense
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.select import follows_in_sample, shift_left, shift_right


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """No row moves; a label's weight is the mean over three neighbours of their clamped scores,
    over the sample's mean of the same."""

    low: float = 1.0
    """Lower bound of a score, in the score's unit; nats for `gain`."""

    high: float = 5.0
    """Upper bound of a score; one above it weighs no more."""

    def __post_init__(self) -> None:
        above = f"must be low={self.low} or more"
        refuse_knobs(
            self,
            lambda: [
                ("low", self.low > 0.0, "must be above 0"),
                ("high", self.high >= self.low, above),
            ],
        )

    @property
    def chooses(self) -> bool:
        return True

    def spans(self, first_layer: int, last_layer: int) -> tuple[Span, ...]:
        return ()

    def plan(self, batch: TokenBatch, ranked: Ranked, rows: RowLayout) -> ElisionPlan:
        pooled_BT = mean_of_neighbours(batch, ranked.score_BT.clamp(self.low, self.high))
        pooled_L = pooled_BT[batch.is_label_BT]
        sample_L = batch.sample_BT[batch.is_label_BT]
        num_S = torch.bincount(sample_L, minlength=len(batch.flat_keys))
        sum_S = torch.zeros(len(num_S), dtype=pooled_L.dtype).index_add(0, sample_L, pooled_L)
        weight_L = pooled_L * (num_S / sum_S)[sample_L]
        return replace(plan_dense(batch), weight_L=weight_L.float())


def mean_of_neighbours(batch: TokenBatch, value_BT: Tensor) -> Tensor:
    """Return at each label position the mean over it and the label positions next to it in the same
    answer: two at an answer's ends, one alone in an answer of one."""
    is_label_BT = batch.is_label_BT
    value_BT = value_BT.masked_fill(~is_label_BT, 0.0)
    # Label positions of one answer follow each other; at least one other position is between two.
    has_left_BT = is_label_BT & shift_right(is_label_BT, False) & follows_in_sample(batch)
    has_right_BT = shift_left(has_left_BT, False)
    left_BT = shift_right(value_BT, 0.0).masked_fill(~has_left_BT, 0.0)
    right_BT = shift_left(value_BT, 0.0).masked_fill(~has_right_BT, 0.0)
    num_BT = 1 + has_left_BT.long() + has_right_BT.long()
    return (value_BT + left_BT + right_BT) / num_BT
