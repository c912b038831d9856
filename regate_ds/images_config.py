"""How many image tokens are kept, by which ranking, and in which steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, ClassVar

from regate_ds.algorithm.knobs import Rule, refuse_knobs
from regate_ds.algorithm.rankings.random import RandomOrder
from regate_ds.algorithm.rankings.ranking import Ranking
from regate_ds.algorithm.rankings.table import RANKINGS
from regate_ds.algorithm.schedule import KeepShare, elides, share_rules
from regate_ds.schedule_config import ScheduleConfig
from regate_ds.settings.refuse import refuse_choices


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Image tokens in sparse steps; each image keeps its share."""

    keep_share: KeepShare = 1.0
    """Share of each image's tokens that are kept in a sparse step; 1.0 keeps them all. It may move
    over the run (see `images.keep_share.*`)."""

    ranking: Ranking = field(default_factory=RandomOrder)
    """Order in which an image's tokens are kept; `pixels`, `diversity`, `attention` and `mixed`
    read orders that `regate rank` computes once."""

    fill_rows: bool = False
    """Rows of a micro-batch that are shorter than the longest take further tokens of their images,
    in their order, where padding would lie. Ragged rows have no such places."""

    schedule: ScheduleConfig | None = None
    """Which steps keep whole images; null is `elision.schedule` (see `images.schedule.*`)."""

    CHOICES: ClassVar[dict[str, Mapping[str, type[Any]]]] = {"ranking": RANKINGS}

    def __post_init__(self) -> None:
        kinds = {"ranking": tuple(RANKINGS.values()), "schedule": (ScheduleConfig, NoneType)}
        refuse_choices(self, kinds)
        refuse_knobs(self, self._rules)

    def _rules(self) -> list[Rule]:
        fills = not self.fill_rows or elides(self.keep_share)
        return [
            *share_rules("keep_share", self.keep_share),
            (
                "fill_rows",
                fills,
                "needs a keep_share below 1: there is nothing to fill in",
            ),
        ]
