"""Score and place the tokens of samples that the student has not seen yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.images import ReadOrders
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.rankings.ranking import ImageKey
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.window import (
    Choice,
    Method,
    count_hard,
    place_images,
    plan_window,
    score_window,
)
from regate_ds.config import RegateConfig
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.stores.image_orders.reader import ImageOrderStore


def score_unseen(
    method: Method, window: Sequence[TokenBatch], reference_N: Tensor | None
) -> Tensor:
    """Return the score of each label position of samples that the student has not seen.

    reference_N: the teacher's losses; None scores as if they were all 0.
    """
    num_labels = sum(batch.num_labels for batch in window)
    statistics = {
        one.name: torch.full((num_labels,), one.unseen) for one in method.score.statistics
    }
    if reference_N is None:
        reference_N = torch.zeros(num_labels)
    return score_window(method, window, step=0, reference_N=reference_N, statistics=statistics)


def place_unseen(
    method: Method, window: Sequence[TokenBatch], step: int, read_orders: ReadOrders
) -> tuple[Tensor, ...] | None:
    """Return the places of a window's image tokens; None if images are not elided."""
    if not (method.execution.chooses and method.image_share < 1.0):
        return None
    return place_images(method, window, step=step, read_orders=read_orders)


def read_orders_of(config: RunConfig) -> ReadOrders:
    """Return what reads the orders of image tokens: the run's store, if it is there."""
    ranking, path = config.elision.stored_ranking, config.rank.store
    if ranking is None or path is None or not path.exists():
        return in_reading_order
    store = ImageOrderStore(path)
    store.require_ranking(ranking)
    return store.read


def in_reading_order(images: Sequence[ImageKey], sizes: Sequence[int]) -> list[Tensor]:
    """Return orders that keep the first tokens of each image."""
    return [torch.arange(size) for size in sizes]


def plan_unseen(
    config: RegateConfig,
    window: Sequence[TokenBatch],
    reference_N: Tensor,
    rows: RowLayout,
    read_orders: ReadOrders,
) -> tuple[Tensor, tuple[ElisionPlan, ...]]:
    """Return the scores of a window that is a whole sparse step, the first one, and its plans."""
    method = config.method(*config.shares_at(0.0))
    values_N = score_unseen(method, window, reference_N)
    num_hard_S, _ = count_hard(method, window, values_N, state={})
    beyond = place_unseen(method, window, 0, read_orders)
    choice = Choice(values_N=values_N, num_hard_S=num_hard_S, beyond=beyond)
    return values_N, plan_window(method, window, choice, rows)
