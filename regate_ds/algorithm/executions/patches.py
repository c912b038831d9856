"""What a plan says of slots that hold several positions each.

Shapes: B rows, T positions, K slots of a row, S = B * K slots, M positions of a slot at most, and
as many targets, U slots that predict something, L targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """The positions of each slot, and the targets that each predicts."""

    row_length: int
    """T, the positions of a row that slots are made of."""

    member_SM: Tensor
    """int64: the positions of each slot, as flat indices into [B * T]."""

    is_member_SM: Tensor
    """bool: False where a slot has fewer positions than M."""

    place_BK: Tensor
    """int64: each slot's number in its sample, which is its position for the decoder."""

    predicts_U: Tensor
    """int64: the slots that predict something, as flat indices into [B * K], in reading order."""

    cell_L: Tensor
    """int64, ascending: the place of each target in [U * M], by the slot that predicts it."""

    @property
    def size(self) -> int:
        """M."""
        return self.member_SM.shape[1]

    def to(self, device: torch.device | str) -> Patches:
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)
