"""Tokens that differ most from one another, by the projector's features.

The first is the token whose nearest other token is farthest; then, repeatedly, the one that is
farthest from all chosen. Distances are cosine distances; ties go to the lower index.

Shapes: n tokens of an image, F features, C tokens of one block.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from regate_ds.algorithm.rankings.ranking import ByStoredOrder, Picture, Reads

_BLOCK = 1024
"""Number of tokens whose distances to all others exist at one time."""


@dataclass(frozen=True, kw_only=True)
class DiversityOrder(ByStoredOrder):
    """Max-min diversity over the features that the decoder gets."""

    @property
    def stored(self) -> str:
        return "diversity"

    @property
    def reads(self) -> Reads:
        return "features"

    def order(self, picture: Picture, num_first: int) -> Tensor:
        assert picture.features_nF is not None
        x_nF = F.normalize(picture.features_nF.float(), dim=1)
        if num_first == 0:
            return torch.empty(0, dtype=torch.int64)
        chosen = [int(_nearest_other(x_nF).argmax())]
        distance_n = 1 - x_nF @ x_nF[chosen[0]]
        while len(chosen) < num_first:
            distance_n[chosen[-1]] = -torch.inf
            chosen.append(int(distance_n.argmax()))
            distance_n = distance_n.minimum(1 - x_nF @ x_nF[chosen[-1]])
        return torch.tensor(chosen)


def _nearest_other(x_nF: Tensor) -> Tensor:
    """Return each token's distance to the nearest other token; a lone token's is infinite."""
    nearest = []
    for start in range(0, len(x_nF), _BLOCK):
        distance_Cn = 1 - x_nF[start : start + _BLOCK] @ x_nF.T
        distance_Cn.diagonal(start).fill_(torch.inf)
        nearest.append(distance_Cn.amin(dim=1))
    return torch.cat(nearest)
