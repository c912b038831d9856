"""`run.plan_only=true`: plan the sparse steps of one epoch and report what they keep.

No model runs. Without a reference store all positions have the same score: the kept positions then
differ from a real run's, and with ``align: both`` their number does too. Without the store of image
orders that a run reads, image tokens are kept in reading order: their number is the same. The steps
are planned for the data ranks that the launcher announces, or that the variable WORLD_SIZE gives.
Shares that move over the run do so over this epoch, as if it were the sparse part of the run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.counts import COUNTS, count_step
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.quotas.quota import QuotaState
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.window import (
    Choice,
    count_hard,
    plan_window,
    window_keys,
)
from regate_ds.config import RegateConfig
from regate_ds.data.collate import Collator, LoadedSample
from regate_ds.job.process import Process
from regate_ds.job.progress import progress
from regate_ds.parallel.resharding import SequenceCut
from regate_ds.recipe.config.length import judge_length
from regate_ds.recipe.config.sections import ParallelConfig
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus
from regate_ds.recipe.estimate.unseen import place_unseen, read_orders_of, score_unseen
from regate_ds.recipe.order import Order, make_order
from regate_ds.stores.reference.reader import ReferenceStore


def walk_plan(config: RunConfig, corpus: Corpus) -> dict[str, float]:
    """Plan every step of one epoch as if it were sparse, and return figures over all of them."""
    world_size = data_ranks_of(config.parallel, int(os.environ.get("WORLD_SIZE", "1")))
    show = os.environ.get("RANK", "0") == "0"
    process = Process(0, world_size, torch.device("cpu"))
    order = make_order(config, corpus, process)
    judge_length(config.elision, order.total_steps)
    _require_layers(config, corpus)
    planner = _Planner(config, corpus)
    total, imbalance = _Tally(), 0.0
    with progress(order.steps_per_epoch, desc="plan", unit="step", show=show) as bar:
        for step in range(order.steps_per_epoch):
            one = replace(order, start_step=step, total_steps=step + 1)
            place = step / max(1, order.steps_per_epoch - 1)
            orders = [replace(one, rank=rank) for rank in range(world_size)]
            ranks = planner.plan(orders, step, config.elision.shares_at(place))
            # Kept tokens of the busiest rank over the mean: how long the others wait.
            kept = [tally.kept for tally in ranks]
            imbalance += max(kept) * len(kept) / sum(kept)
            total = sum(ranks, start=total)
            bar.update()
    return {
        **total.figures(),
        "imbalance_over_ranks": imbalance / order.steps_per_epoch,
        **_expected(config.elision, order.total_steps),
        "steps": order.total_steps,
    }


def data_ranks_of(parallel: ParallelConfig | None, world_size: int) -> int:
    """Return how many of a job's ranks read different samples."""
    return world_size if parallel is None else world_size // parallel.ranks_per_copy


def _expected(elision: RegateConfig, num_steps: int) -> dict[str, float]:
    """Return the mean shares that a run of so many steps keeps, before rows are filled."""
    schedules = elision.schedules(num_steps)
    answers, images = schedules.answers, schedules.images
    share = 1.0 if answers is None else answers.expected_share()
    if images is None:
        return {"expected_share": share}
    return {"expected_share": share, "expected_share_of_image": images.expected_share()}


def _require_layers(config: RunConfig, corpus: Corpus) -> None:
    """Refuse layers that the decoder lacks; in training, attaching to the model refuses them."""
    depth = corpus.student.model.get_decoder().config.num_hidden_layers
    first, last = config.elision.first_layer, config.elision.last_layer
    if first >= depth or (last or 0) > depth:
        raise ValueError(
            f"elision.first_layer={first}, elision.last_layer={last}: the decoder has {depth} "
            "layers; set both within them"
        )


@dataclass(frozen=True)
class _Tally:
    """Counts over micro-batches."""

    micro_batches: int = 0
    tokens: int = 0
    labels: int = 0
    kept: int = 0
    targets: int = 0
    images: int = 0
    images_kept: int = 0
    filled: int = 0
    padded: int = 0
    slots: int = 0
    longest: int = 0

    @classmethod
    def of(cls, batch: TokenBatch, plan: ElisionPlan, rows: RowLayout) -> _Tally:
        counts = dict(zip(COUNTS, count_step([batch], [plan], rows.num_padding), strict=True))
        return cls(
            micro_batches=1,
            tokens=counts["tokens_total"],
            labels=counts["answer_total"],
            kept=counts["tokens_kept"],
            targets=counts["answer_kept"],
            images=counts["image_total"],
            images_kept=counts["image_kept"],
            filled=counts["filled"],
            padded=counts["padded"],
            slots=plan.num_slots,
            longest=plan.num_slots,
        )

    def __add__(self, other: _Tally) -> _Tally:
        sums = [a + b for a, b in zip(astuple(self), astuple(other))]
        return replace(_Tally(*sums), longest=max(self.longest, other.longest))

    def figures(self) -> dict[str, float]:
        of_image = {"kept_share_of_image": self.images_kept / self.images} if self.images else {}
        return {
            "kept_share_of_tokens": self.kept / self.tokens,
            "kept_share_of_answer": self.targets / self.labels,
            **of_image,
            "row_length_mean": self.slots / self.micro_batches,
            "row_length_max": self.longest,
            "padding_share": self.padded / (self.kept + self.padded),
            "filled": self.filled,
        }


class _Planner:
    """Plans the windows of all data ranks as sparse steps would, with difficulty unseen."""

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self._config, self._data = config.elision, corpus.train
        self._rows = row_layout_of(config)
        self._state: QuotaState = {}
        self._read_orders = read_orders_of(config)
        self._collator = Collator(pad_id=0, vision=None, pack_length=config.data.pack_length)
        path = None if config.scores_online else config.teacher.store
        self._store = ReferenceStore(path) if path is not None and path.exists() else None
        if self._store is not None:
            self._store.require(corpus.index.fingerprint)
            self._store.require_column(config.elision.column)

    def plan(self, orders: Sequence[Order], step: int, shares: tuple[float, float]) -> list[_Tally]:
        """Return the counts over each data rank's micro-batches of a step.

        shares: what the step keeps of the answers and of the images.
        """
        windows = [[self._batch(numbers) for numbers in order] for order in orders]
        everything = [batch for window in windows for batch in window]
        reference_N = None if self._store is None else self._store.read(window_keys(everything))
        method = self._config.method(*shares)
        values_N = score_unseen(method, everything, reference_N)
        # One process stands for all data ranks: it has their values, and exchanges nothing.
        num_hard_S, self._state = count_hard(method, everything, values_N, state=self._state)
        values = values_N.split([sum(map(_num_labels, window)) for window in windows])
        counts = num_hard_S.split([len(window_keys(window)) for window in windows])
        tallies = []
        for window, values_n, counts_s in zip(windows, values, counts, strict=True):
            choice = Choice(
                values_N=values_n,
                num_hard_S=counts_s,
                beyond=place_unseen(method, window, step, self._read_orders),
                step=step,
            )
            plans = plan_window(method, window, choice, self._rows)
            pairs = zip(window, plans, strict=True)
            tallies.append(sum((_Tally.of(*pair, self._rows) for pair in pairs), _Tally()))
        return tallies

    def _batch(self, numbers: Sequence[int]) -> TokenBatch:
        return self._collator([LoadedSample(self._data.encode(i), ()) for i in numbers]).tokens


def _num_labels(batch: TokenBatch) -> int:
    return int(batch.is_label_BT.sum())


def row_layout_of(config: RunConfig) -> RowLayout:
    """Return how the run's engine lays kept rows out."""
    parallel = config.parallel
    if parallel is None:
        return config.elision.rows
    cut = SequenceCut(parallel.context, parallel.tensor if parallel.sequence else 1)
    return cut.row_layout(parallel.row_format, config.elision.token_multiple)
