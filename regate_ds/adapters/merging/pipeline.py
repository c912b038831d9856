"""Merged steps in DeepSpeed's pipeline: the first stage merges, the last has the patches' loss.

The stages between see shorter rows, and nothing else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regate_ds.adapters.deepspeed.pipeline_layers import Embed, Flow, Head
from regate_ds.adapters.merging.huggingface import require_mergeable
from regate_ds.algorithm.executions.merge import mean_of_members
from regate_ds.algorithm.executions.patch_loss import summed_patch_loss
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.families.hosts import Supported


def merging_ends(host: Any, support: Supported) -> tuple[type[Embed], type[Head]]:
    """Return the first and the last layer of a pipeline with merged steps.

    ValueError names what a model has that cannot be merged.
    """
    require_mergeable(host, support, num_virtual=0)
    return MergingEmbed, MergingHead


class MergingEmbed(Embed):
    """Embed, and in merged steps put out a row for each patch."""

    def forward(self, inputs: tuple[Tensor, ...]) -> Flow:
        flow = super().forward(inputs)
        hidden, _, number = flow
        plan = self._table.look_up(number).plan
        if plan is None or plan.patches is None:
            return flow
        return mean_of_members(hidden, plan), plan.patches.place_BK.contiguous(), number


class MergingHead(Head):
    """The head, with several targets a slot in merged steps."""

    def _summed(self, rows: Tensor, plan: ElisionPlan) -> tuple[Tensor, Tensor, Tensor | None]:
        if plan.patches is None:
            return super()._summed(rows, plan)
        return summed_patch_loss(
            self.norm(rows.index_select(0, plan.patches.predicts_U)),
            self.head.weight,
            self.head.bias,
            plan.targets_L,
            plan.patches,
            with_entropy=self._with_entropy,
        )
