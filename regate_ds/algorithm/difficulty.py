"""What the student still finds hard: a moving average of its own loss at each label position."""

from __future__ import annotations

import torch
from torch import Tensor


def update_difficulty(old_N: Tensor, loss_N: Tensor, *, decay: float) -> Tensor:
    """Blend fresh losses in: m <- decay * m + (1 - decay) * loss, without bias correction.

    Give only positions whose loss entered the gradient; all others keep their value. fp32.
    """
    return torch.lerp(loss_N.to(old_N.dtype), old_N, decay)
