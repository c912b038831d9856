"""Take the kept positions out of the residual stream, and put their results back.

Shapes: B rows, T positions of a row, K slots of a row after the gate, R real slots, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regate_ds.algorithm.plan import ElisionPlan


def keep(x_BTH: Tensor, plan: ElisionPlan) -> Tensor:
    """Return the kept positions of each row in reading order, [B, K, H].

    It is the input itself if the plan moves no rows.
    """
    if not plan.moves_rows:
        return x_BTH
    num_rows, num_tokens, hidden = x_BTH.shape
    start_B1 = num_tokens * torch.arange(num_rows, device=x_BTH.device)[:, None]
    # Unlike gather, index_select saves its index for the backward pass, and not the rows.
    flat_K = (plan.kept_BK + start_B1).reshape(-1)
    return x_BTH.reshape(-1, hidden).index_select(0, flat_K).view(num_rows, -1, hidden)


def restore(x_BTH: Tensor, y_BKH: Tensor, plan: ElisionPlan) -> Tensor:
    """Put results back to their positions; elided ones ride the residual stream unchanged."""
    if not plan.moves_rows:
        return y_BKH
    hidden = x_BTH.shape[-1]
    y_RH = y_BKH.reshape(-1, hidden).index_select(0, plan.slot_R)
    return x_BTH.reshape(-1, hidden).index_copy(0, plan.position_R, y_RH).view_as(x_BTH)
