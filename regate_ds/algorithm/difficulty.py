"""Difficulty: a moving average of the student's own loss at each label position.

Shapes: N label positions of the micro-batch in reading order, L kept targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan


def update_difficulty(old_N: Tensor, loss_N: Tensor, *, decay: float) -> Tensor:
    """Blend new losses in: m <- decay * m + (1 - decay) * loss, without bias correction.

    Give only positions whose loss entered the gradient; all others keep their value.
    """
    return torch.lerp(loss_N.to(old_N.dtype), old_N, decay)


def updated_difficulty(
    batch: TokenBatch, plan: ElisionPlan, old_N: Tensor, losses_L: Tensor, decay: float
) -> Tensor:
    """Return the difficulty [N] of a micro-batch after the losses [L] of its kept targets.

    RuntimeError if a loss is not finite; it names the sample and the position.
    """
    number_P = batch.is_label_BT.reshape(-1).long().cumsum(0) - 1
    seen_L = number_P[plan.label_position_L]
    loss_L = losses_L.to("cpu", torch.float32)
    _require_finite(batch, plan, loss_L)
    return old_N.index_copy(0, seen_L, update_difficulty(old_N[seen_L], loss_L, decay=decay))


def _require_finite(batch: TokenBatch, plan: ElisionPlan, losses_L: Tensor) -> None:
    bad_L = (~losses_L.isfinite()).nonzero().squeeze(1)
    if len(bad_L) == 0:
        return
    flat_position = int(plan.label_position_L[bad_L[0]])
    name, number = batch.flat_keys[int(batch.sample_BT.reshape(-1)[flat_position])]
    row, position = divmod(flat_position, plan.num_tokens)
    raise RuntimeError(
        f"step {plan.step}: the loss of sample {name!r} record {number} at position {position} of "
        f"row {row} is {float(losses_L[bad_L[0]])}; the run has diverged: resume from an earlier "
        "checkpoint with a lower learning rate"
    )
