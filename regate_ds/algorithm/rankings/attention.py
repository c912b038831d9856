"""Tokens that the tower attends to: contribution over all layers, and complementary detail.

A token's contribution is the attention that it receives, summed over the tower's layers; among the
rest, detail is what the middle layer attends to. The two take turns, so that any first part of the
order has ``contribution_share`` of the one. After the idea of freePruner (arXiv 2411.15446), whose
formula is not public.

Shapes: L layers of the tower, n tokens of an image.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.rankings.ranking import ByStoredOrder, Picture, Reads, by_value


@dataclass(frozen=True, kw_only=True)
class AttentionOrder(ByStoredOrder):
    """Attention received in the vision tower."""

    contribution_share: float = 0.5
    """Share of the kept tokens that are chosen by their contribution over all layers; the others
    by the middle layer alone."""

    def __post_init__(self) -> None:
        share = self.contribution_share
        rule = ("contribution_share", 0.0 <= share <= 1.0, "must be in [0, 1]")
        refuse_knobs(self, lambda: [rule])

    @property
    def stored(self) -> str:
        return f"attention contribution_share={self.contribution_share}"

    @property
    def reads(self) -> Reads:
        return "attention"

    def order(self, picture: Picture, num_first: int) -> Tensor:
        assert picture.attention_Ln is not None
        attention_Ln = picture.attention_Ln.float()
        contribution = iter(by_value(attention_Ln.sum(dim=0)).tolist())
        detail = iter(by_value(attention_Ln[len(attention_Ln) // 2]).tolist())
        chosen: dict[int, None] = {}
        while len(chosen) < num_first:
            wanted = math.ceil(self.contribution_share * (len(chosen) + 1) - 1e-9)
            by_all = wanted > math.ceil(self.contribution_share * len(chosen) - 1e-9)
            source = contribution if by_all else detail
            chosen[next(token for token in source if token not in chosen)] = None
        return torch.tensor(list(chosen), dtype=torch.int64)
