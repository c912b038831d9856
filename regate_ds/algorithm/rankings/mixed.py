"""A share of the kept tokens by a stored order, the rest drawn anew in each step."""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.quotas.quota import share_of
from regate_ds.algorithm.rankings.attention import AttentionOrder
from regate_ds.algorithm.rankings.diversity import DiversityOrder
from regate_ds.algorithm.rankings.pixels import PixelOrder
from regate_ds.algorithm.rankings.random import RandomOrder
from regate_ds.algorithm.rankings.ranking import RankingInputs, StoredRanking

STORED: dict[str, type[StoredRanking]] = {
    "pixels": PixelOrder,
    "diversity": DiversityOrder,
    "attention": AttentionOrder,
}
"""The rankings whose orders are computed once, by name."""


@dataclass(frozen=True, kw_only=True)
class MixedOrder:
    """First the best of a stored order, then tokens drawn anew among the others."""

    by: str = "diversity"
    """The stored ranking, by name, with its default knobs."""

    ranked_share: float = 0.5
    """Share of the kept tokens that come from the stored order."""

    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        share = self.ranked_share
        refuse_knobs(
            self,
            lambda: [
                ("by", self.by in tuple(STORED), f"must be one of {tuple(STORED)}"),
                ("ranked_share", 0.0 <= share <= 1.0, "must be in [0, 1]"),
            ],
        )

    @property
    def base(self) -> StoredRanking:
        return STORED[self.by]()

    @property
    def stored(self) -> str:
        return self.base.stored

    def __call__(self, inputs: RankingInputs) -> Tensor:
        ranked_M = self.base(inputs)
        drawn_M = RandomOrder(seed=self.seed)(inputs)
        num_ranked_I = share_of(inputs.num_kept_I, self.ranked_share)
        sizes = inputs.sizes_I.tolist()
        parts = zip(ranked_M.split(sizes), drawn_M.split(sizes), num_ranked_I.tolist(), strict=True)
        return torch.cat([torch.empty(0, dtype=torch.int64), *(_joined(*part) for part in parts)])


def _joined(ranked_n: Tensor, drawn_n: Tensor, num_ranked: int) -> Tensor:
    """Return places: the first ``num_ranked`` as they are, the others by the draw after them."""
    key_n = torch.where(ranked_n < num_ranked, ranked_n, num_ranked + drawn_n)
    return key_n.argsort(stable=True).argsort(stable=True)
