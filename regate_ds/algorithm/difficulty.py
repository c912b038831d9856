"""What the student still finds hard: a moving average of its own loss at each label position."""

from __future__ import annotations

import torch
from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan


def update_difficulty(old_N: Tensor, loss_N: Tensor, *, decay: float) -> Tensor:
    """Blend fresh losses in: m <- decay * m + (1 - decay) * loss, without bias correction.

    Give only positions whose loss entered the gradient; all others keep their value. fp32.
    """
    return torch.lerp(loss_N.to(old_N.dtype), old_N, decay)


def updated_difficulty(
    batch: TokenBatch, plan: ElisionPlan, old_N: Tensor, losses_L: Tensor, decay: float
) -> Tensor:
    """Difficulty of the micro-batch's label positions [N] after its kept targets' losses."""
    number_P = batch.is_label_BT.reshape(-1).long().cumsum(0) - 1
    seen_L = number_P[plan.label_position_L]
    fresh_L = losses_L.to("cpu", torch.float32)
    _require_finite(batch, plan, fresh_L)
    return old_N.index_copy(0, seen_L, update_difficulty(old_N[seen_L], fresh_L, decay=decay))


def _require_finite(batch: TokenBatch, plan: ElisionPlan, losses_L: Tensor) -> None:
    bad_L = (~losses_L.isfinite()).nonzero().squeeze(1)
    if len(bad_L) == 0:
        return
    where = int(plan.label_position_L[bad_L[0]])
    name, number = batch.flat_keys[int(batch.sample_BT.reshape(-1)[where])]
    row, position = divmod(where, plan.num_tokens)
    raise RuntimeError(
        f"step {plan.step}: the loss of sample {name!r} record {number} at position {position} of "
        f"row {row} is {float(losses_L[bad_L[0]])}; the run has diverged: resume from an earlier "
        "checkpoint with a lower learning rate"
    )
