"""All positions are computed, and the step's own losses choose which of them have one.

The score is given this step's losses and entropies in place of those it remembers, so `loss` and
`entropy` are the value at risk of ESLM (arXiv 2505.19893) at alpha = 1 - keep_share, and
`excess_loss` against the student's starting weights is Rho-1's formula (arXiv 2404.07965), whose
own reference was trained further on chosen data. How many are chosen is known before the forward
pass, and so is what the loss is divided by.

Shapes: L label positions of a micro-batch, C chosen ones.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.executions.execution import Ranked, Span
from regate_ds.algorithm.plan import ElisionPlan, plan_dense
from regate_ds.algorithm.quotas.quota import share_of
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.scores.score import Score, ScoreInputs


@dataclass(frozen=True, kw_only=True)
class AfterForward:
    """No row moves; of all label positions of a micro-batch the share with the highest scores has a
    loss."""

    @property
    def chooses(self) -> bool:
        return True

    def spans(self, first_layer: int, last_layer: int) -> tuple[Span, ...]:
        return ()

    def plan(self, batch: TokenBatch, ranked: Ranked, rows: RowLayout) -> ElisionPlan:
        plan, reference_BT = plan_dense(batch), ranked.reference_BT
        num_chosen = int(share_of(torch.tensor([plan.num_targets]), ranked.keep_share))
        reference_L = None if reference_BT is None else reference_BT[batch.is_label_BT]
        return replace(plan, num_chosen=num_chosen, reference_L=reference_L)


def narrowed(plan: ElisionPlan, chosen_C: Tensor) -> ElisionPlan:
    """Return the plan with those of its targets that were chosen after the forward pass."""
    names = ("label_slot_L", "label_position_L", "targets_L")
    chosen = {name: getattr(plan, name)[chosen_C] for name in names}
    return replace(plan, **chosen, num_chosen=None, reference_L=None)


def ranks_fresh_values(score: Score) -> bool:
    """Return whether a score is made of a step's own values, and of no average of older ones."""
    statistics = score.statistics
    return bool(statistics) and all(one.decay == 0.0 for one in statistics)


def chosen_targets(score: Score, plan: ElisionPlan, values: Mapping[str, Tensor]) -> Tensor:
    """Return which targets of a plan have a loss: int64 [C], ascending; ties: the earlier one.

    values: what the forward pass gave at each target [L], by the names of ``Statistic.of``.
    """
    inputs = ScoreInputs(
        step=plan.step,
        keys=(),
        num_labels_S=torch.tensor([len(plan.targets_L)]),
        reference_N=plan.reference_L,
        statistics={one.name: values[one.of] for one in score.statistics},
    )
    order_L = score(inputs).double().argsort(descending=True, stable=True)
    return order_L[: plan.num_chosen].sort().values
