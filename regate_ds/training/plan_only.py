"""`run.plan_only=true`: plan the sparse steps of one epoch and say what they keep. No model runs.

Without a reference store all positions score alike: with ``align: both`` the count kept depends on
the scores, otherwise only which positions are kept does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from tqdm import tqdm

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.select import ElisionPlan, plan_sparse
from regate_ds.config import RegateConfig
from regate_ds.data.collate import Collator, LoadedSample
from regate_ds.data.reference_store import ReferenceStore
from regate_ds.session import schedule_of
from regate_ds.training.configuration import RunConfig
from regate_ds.training.order import Order
from regate_ds.training.process import Process
from regate_ds.training.task import Task
from regate_ds.training.trainer import make_order

Planned = tuple[TokenBatch, ElisionPlan]


def walk_plan(config: RunConfig, task: Task) -> dict[str, float]:
    """Plan every step of one epoch as if it were sparse, for as many data ranks as launched."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    process = Process(0, world_size, torch.device("cpu"))
    order = make_order(config, len(task.train_records), process)
    knobs = config.elision.knobs(order.total_steps)
    known = config.teacher.store is not None and config.teacher.store.exists()
    store = ReferenceStore(config.teacher.store) if known and config.teacher.store else None
    steps = [
        [
            list(
                _planned(
                    replace(order, start_step=step, total_steps=step + 1, rank=rank),
                    task,
                    knobs,
                    store,
                    config.data.pack_length,
                )
            )
            for rank in range(world_size)
        ]
        for step in tqdm(range(order.steps_per_epoch), unit="step", desc="plan")
    ]
    return {
        **_figures([planned for ranks in steps for window in ranks for planned in window]),
        "imbalance_over_ranks": sum(map(_imbalance, steps)) / len(steps),
        "expected_share": schedule_of(knobs).expected_share(knobs.keep_share),
        "steps": order.total_steps,
    }


def _planned(
    order: Order,
    task: Task,
    knobs: RegateConfig,
    store: ReferenceStore | None,
    pack_length: int | None,
) -> Iterator[Planned]:
    collator = Collator(pad_id=0, vision=None, pack_length=pack_length)
    for numbers in order:
        batch = collator([LoadedSample(task.train.encode(i), ()) for i in numbers]).tokens
        num_labels = int(batch.is_label_BT.sum())
        score_N = torch.zeros(num_labels) if store is None else store.read(batch.flat_keys)
        yield (
            batch,
            plan_sparse(
                batch,
                score_N,
                keep_share=knobs.keep_share,
                align=knobs.align,
                token_multiple=knobs.token_multiple,
            ),
        )


def _figures(planned: list[Planned]) -> dict[str, float]:
    tokens = sum(int((batch.segment_BT >= 0).sum()) for batch, _ in planned)
    labels = sum(int(batch.is_label_BT.sum()) for batch, _ in planned)
    kept = sum(plan.num_kept for _, plan in planned)
    padded = sum(plan.num_padded for _, plan in planned)
    return {
        "kept_share_of_tokens": kept / tokens,
        "kept_share_of_answer": sum(plan.num_targets for _, plan in planned) / labels,
        "row_length_mean": sum(plan.num_slots for _, plan in planned) / len(planned),
        "row_length_max": max(plan.num_slots for _, plan in planned),
        "padding_share": padded / (kept + padded),
        "filled": sum(plan.num_filled for _, plan in planned),
    }


def _imbalance(ranks: list[list[Planned]]) -> float:
    """Kept tokens of the busiest rank over the mean: how long the others wait."""
    kept = [sum(plan.num_kept for _, plan in window) for window in ranks]
    return max(kept) * len(kept) / sum(kept)
