"""The decoder's norm where Transformer Engine is missing.

Megatron would take torch's own norm, which refuses sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RootMeanSquareNorm(nn.Module):
    """Normalizes as Hugging Face's decoders do: in single precision, then times the weight."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """Take the arguments with which Megatron builds a norm, by its names."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each tensor rank has the gradient of its part of the sequence. By this mark Megatron
        # sums them.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)
