"""`run.plan_only=true`: plan the sparse steps of one epoch and report what they keep.

No model runs. Without a reference store all positions have the same score: the kept positions then
differ from a real run's, and with ``align: both`` their number does too. The steps are planned for
the data ranks that the launcher announces, or that the variable WORLD_SIZE gives.
"""

from __future__ import annotations

import os
from dataclasses import astuple, dataclass, replace

import torch

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.select import plan_sparse
from regate_ds.config import RegateConfig, schedule_of
from regate_ds.data.collate import Collator, LoadedSample
from regate_ds.job.process import Process
from regate_ds.job.progress import progress
from regate_ds.recipe.config.sections import ParallelConfig
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus
from regate_ds.recipe.order import Order, make_order
from regate_ds.stores.reference.reader import ReferenceStore


def walk_plan(config: RunConfig, corpus: Corpus) -> dict[str, float]:
    """Plan every step of one epoch as if it were sparse, and return figures over all of them."""
    world_size = data_ranks_of(config.parallel, int(os.environ.get("WORLD_SIZE", "1")))
    show = os.environ.get("RANK", "0") == "0"
    process = Process(0, world_size, torch.device("cpu"))
    order = make_order(config, len(corpus.train_records), process)
    config.elision.judge_length(order.total_steps)
    _require_layers(config, corpus)
    planner = _Planner(config, corpus, config.elision.for_run(order.total_steps))
    total, imbalance = _Tally(), 0.0
    with progress(order.steps_per_epoch, desc="plan", unit="step", show=show) as bar:
        for step in range(order.steps_per_epoch):
            one = replace(order, start_step=step, total_steps=step + 1)
            ranks = [planner.plan(replace(one, rank=rank)) for rank in range(world_size)]
            # Kept tokens of the busiest rank over the mean: how long the others wait.
            kept = [tally.kept for tally in ranks]
            imbalance += max(kept) * len(kept) / sum(kept)
            total = sum(ranks, start=total)
            bar.update()
    return {
        **total.figures(),
        "imbalance_over_ranks": imbalance / order.steps_per_epoch,
        "expected_share": schedule_of(planner.regate_config).expected_share(
            planner.regate_config.keep_share
        ),
        "steps": order.total_steps,
    }


def data_ranks_of(parallel: ParallelConfig | None, world_size: int) -> int:
    """Return how many of a job's ranks read different samples."""
    return world_size if parallel is None else world_size // parallel.ranks_per_copy


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
    filled: int = 0
    padded: int = 0
    slots: int = 0
    longest: int = 0

    @classmethod
    def of(cls, batch: TokenBatch, plan: ElisionPlan) -> _Tally:
        return cls(
            micro_batches=1,
            tokens=int((batch.segment_BT >= 0).sum()),
            labels=int(batch.is_label_BT.sum()),
            kept=plan.num_kept,
            targets=plan.num_targets,
            filled=plan.num_filled,
            padded=plan.num_padded,
            slots=plan.num_slots,
            longest=plan.num_slots,
        )

    def __add__(self, other: _Tally) -> _Tally:
        sums = [a + b for a, b in zip(astuple(self), astuple(other))]
        return replace(_Tally(*sums), longest=max(self.longest, other.longest))

    def figures(self) -> dict[str, float]:
        return {
            "kept_share_of_tokens": self.kept / self.tokens,
            "kept_share_of_answer": self.targets / self.labels,
            "row_length_mean": self.slots / self.micro_batches,
            "row_length_max": self.longest,
            "padding_share": self.padded / (self.kept + self.padded),
            "filled": self.filled,
        }


class _Planner:
    """Plans micro-batches of a corpus as sparse steps would, with difficulty 0."""

    def __init__(self, config: RunConfig, corpus: Corpus, regate_config: RegateConfig) -> None:
        self.regate_config, self._data = regate_config, corpus.train
        self._collator = Collator(pad_id=0, vision=None, pack_length=config.data.pack_length)
        path = None if config.scores_online else config.teacher.store
        self._store = ReferenceStore(path) if path is not None and path.exists() else None
        if self._store is not None:
            self._store.require(corpus.index.fingerprint)

    def plan(self, order: Order) -> _Tally:
        """Return the counts over the micro-batches of one rank's step."""
        batches = [
            self._collator([LoadedSample(self._data.encode(i), ()) for i in numbers]).tokens
            for numbers in order
        ]
        return sum((_Tally.of(batch, self._sparse(batch)) for batch in batches), _Tally())

    def _sparse(self, batch: TokenBatch) -> ElisionPlan:
        if self._store is None:
            score_N = torch.zeros(int(batch.is_label_BT.sum()))
        else:
            score_N = self._store.read(batch.flat_keys)
        return plan_sparse(
            batch,
            score_N,
            keep_share=self.regate_config.keep_share,
            align=self.regate_config.align,
            token_multiple=self.regate_config.token_multiple,
        )
