"""All rankings, by the name that a configuration gives them."""

from __future__ import annotations

from regate_ds.algorithm.rankings.mixed import STORED, MixedOrder
from regate_ds.algorithm.rankings.random import RandomOrder
from regate_ds.algorithm.rankings.ranking import Ranking, StoredRanking
from regate_ds.algorithm.rankings.stride import StrideOrder

RANKINGS: dict[str, type[Ranking]] = {
    "random": RandomOrder,
    "stride": StrideOrder,
    **STORED,
    "mixed": MixedOrder,
}


def stored_ranking(ranking: Ranking) -> StoredRanking | None:
    """Return the ranking whose orders are to be computed; None if it reads none."""
    if isinstance(ranking, MixedOrder):
        return ranking.base
    return ranking if isinstance(ranking, tuple(STORED.values())) else None
