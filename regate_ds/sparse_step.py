"""What a sparse step keeps: answers by score and quota, image tokens by their ranking.

Answers and images may have schedules of their own, so that a step may be sparse in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.quotas.quota import QuotaState
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.schedule import Schedules
from regate_ds.algorithm.window import (
    Choice,
    Method,
    count_hard,
    num_elidable,
    place_images,
    plan_dense_window,
    plan_window,
    score_window,
    window_keys,
)
from regate_ds.config import RegateConfig
from regate_ds.parallel.collectives import all_or_none, gather_rows
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.stores.values import Stores

MakePlans = Callable[[], tuple[ElisionPlan, ...]]


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """Chooses by what the configuration says, from what the stores hold."""

    config: RegateConfig
    stores: Stores
    schedules: Schedules
    rows: RowLayout
    layout: ParallelLayout

    def __post_init__(self) -> None:
        if self.config.images.fill_rows and self.rows.row_format == "ragged":
            raise ValueError(
                "images.fill_rows=True: kept tokens lie in ragged rows here, in which no padding "
                "could be filled; use padded rows (mlp_only has none), or set it to false"
            )

    def choose(
        self,
        window: Sequence[TokenBatch],
        *,
        step: int,
        statistics: Mapping[str, Tensor],
        quota_state: QuotaState,
    ) -> tuple[MakePlans, QuotaState]:
        """Return what makes the plans of a step, and the quota's next state.

        Collective over data ranks.
        """
        if self.schedules.is_merged(step):
            return self._merged(window), quota_state
        if self.schedules.is_dense(step):
            return partial(plan_dense_window, window), quota_state
        method = self.config.method(*self.schedules.shares(step))
        num_labels = sum(batch.num_labels for batch in window)
        values_N, num_hard_S = torch.zeros(num_labels, dtype=torch.float64), num_elidable(window)
        reference_N = None
        if self.schedules.chooses_answers(step) and self.config.chooses_after_forward:
            with self.together():
                reference_N = self._read_reference(window)
        elif self.schedules.chooses_answers(step):
            values_N = self._score(method, window, step, statistics)
            num_hard_S, quota_state = count_hard(
                method,
                window,
                values_N,
                exchange=partial(gather_rows, group=self.layout.data, device=self.layout.device),
                state=quota_state,
            )
        beyond = self._rank(method, window, step) if self.schedules.chooses_images(step) else None
        choice = Choice(
            values_N=values_N,
            num_hard_S=num_hard_S,
            beyond=beyond,
            step=step,
            reference_N=reference_N,
        )
        return partial(plan_window, method, window, choice, self.rows), quota_state

    def _merged(self, window: Sequence[TokenBatch]) -> MakePlans:
        # Here, so that a run without such steps does not load the file.
        from regate_ds.algorithm.executions.merge import plan_merged_window

        return partial(plan_merged_window, window, self.rows, size=self.config.merge.size)

    def _score(
        self,
        method: Method,
        window: Sequence[TokenBatch],
        step: int,
        statistics: Mapping[str, Tensor],
    ) -> Tensor:
        with self.together():
            reference_N = self._read_reference(window)
            return score_window(
                method, window, step=step, reference_N=reference_N, statistics=statistics
            )

    def _read_reference(self, window: Sequence[TokenBatch]) -> Tensor | None:
        reference = self.stores.reference if self.config.needs_reference else None
        return None if reference is None else reference.read(window_keys(window))

    def _rank(self, method: Method, window: Sequence[TokenBatch], step: int) -> tuple[Tensor, ...]:
        orders = self.stores.orders
        with self.together():
            read_orders = None if orders is None else orders.read
            return place_images(method, window, step=step, read_orders=read_orders)

    def together(self, num_values: int = 0) -> Any:
        """Make an error on one data rank an error on all. Collective, when the block ends."""
        return all_or_none(self.layout.data, self.layout.device, num_values=num_values)


def require_stores(config: RegateConfig, stores: Stores) -> None:
    """Refuse, by ValueError, a run without a store that its score or its ranking reads."""
    score, ranking = type(config.score).__name__, type(config.images.ranking).__name__
    lacking = {
        f"score={score} needs the teacher's losses; give Stores(reference=...)": (
            config.needs_reference and stores.reference is None
        ),
        f"score={score} needs statistics of its own; give Stores(difficulty=...)": (
            bool(config.statistics) and stores.difficulty is None
        ),
        f"images.ranking={ranking} needs stored orders; give Stores(orders=...)": (
            config.stored_ranking is not None and stores.orders is None
        ),
    }
    for what in (what for what, is_lacking in lacking.items() if is_lacking):
        raise ValueError(f"{what}, or set execution=none for the dense run")
