"""The decoder's norm where Transformer Engine is missing.

Torch's own, which Megatron would take, refuses sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RootMeanSquareNorm(nn.Module):
    """As Hugging Face's decoders compute it: in single precision, then the weight."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """The names are those by which Megatron builds a norm."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each tensor rank's gradient is of its part of the sequence: Megatron adds them up.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)
