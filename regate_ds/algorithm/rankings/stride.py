"""Evenly spaced image tokens; the grid moves by one token with each step.

Of n tokens k are kept: floor(i * n / k) + step, modulo n, for i from 0 to k - 1. The others follow
in reading order.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.algorithm.rankings.ranking import RankingInputs


@dataclass(frozen=True, kw_only=True)
class StrideOrder:
    """Even spacing with a moving phase; no store is needed."""

    @property
    def stored(self) -> None:
        return None

    def __call__(self, inputs: RankingInputs) -> Tensor:
        sizes = zip(inputs.sizes_I.tolist(), inputs.num_kept_I.tolist(), strict=True)
        parts = [_places(size, num_kept, inputs.step) for size, num_kept in sizes]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def _places(size: int, num_kept: int, step: int) -> Tensor:
    """Return the place of each of an image's tokens."""
    first_k = (torch.arange(num_kept) * size // max(1, num_kept) + step) % max(1, size)
    is_first_n = torch.zeros(size, dtype=torch.bool).index_fill(0, first_k, True)
    order_n = torch.cat([first_k, (~is_first_n).nonzero().squeeze(1)])
    return torch.empty_like(order_n).index_copy(0, order_n, torch.arange(size))
