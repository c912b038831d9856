"""The head's own call: losses of a plan's targets in place of logits.

Shapes: L targets of a plan, C chosen ones, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.executions.after_forward import chosen_targets, narrowed
from regate_ds.algorithm.loss import LogitChange, summed_loss, token_losses
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.scores.score import Score


@dataclass(frozen=True)
class HeadGate:
    """What the head computes for a plan."""

    change: LogitChange
    own_loss: bool
    with_entropy: bool
    with_top1: bool
    score: Score
    """What chooses among the targets, where a plan leaves the choice to the forward pass."""


def head_forward(
    host_forward: Any,
    hidden: Tensor,
    *,
    gate: HeadGate,
    regate_plan: ElisionPlan | None = None,
) -> Any:
    """Return the sum of the losses, the losses, the entropies or None, whether each target is the
    likeliest token or None, and the targets chosen after the forward pass or None. Without a plan,
    return the host's logits.

    This happens inside the head's own call, because ZeRO-3 has its weight here and nowhere else.
    """
    if regate_plan is None:
        return host_forward(hidden)
    head, plan, chosen_C = host_forward.__self__, regate_plan, None
    if plan.num_chosen is not None:
        chosen_C = _choose(head, hidden, plan, gate)
        hidden, plan = hidden.index_select(0, chosen_C), narrowed(plan, chosen_C)
    weight_L, given = plan.weight_L, (hidden, head.weight, head.bias, plan.targets_L)
    if not gate.own_loss:
        top1_L = torch.zeros_like(plan.targets_L, dtype=torch.bool) if gate.with_top1 else None
        found = summed_loss(
            *given, weight_L, gate.change, with_entropy=gate.with_entropy, top1_L=top1_L
        )
        return *found, top1_L, chosen_C
    losses_L, entropy_L = token_losses(*given, gate.change, with_entropy=gate.with_entropy)
    loss_sum = (losses_L if weight_L is None else losses_L * weight_L).sum()
    return loss_sum, losses_L, entropy_L, None, chosen_C


@torch.no_grad()
def _choose(head: Any, hidden_LH: Tensor, plan: ElisionPlan, gate: HeadGate) -> Tensor:
    """Return the targets that the step's own losses choose; it runs the head once more."""
    given = (hidden_LH, head.weight, head.bias, plan.targets_L, None, gate.change)
    _, losses_L, entropy_L = summed_loss(*given, with_entropy=gate.with_entropy)
    entropy = {} if entropy_L is None else {"entropy": entropy_L}
    return chosen_targets(gate.score, plan, {"loss": losses_L, **entropy})
