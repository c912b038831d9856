"""The FLOPs of a step that has run: of its plans, with their padding, its images and its head.

They are the model's: what activation checkpointing computes again does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import StepPlan
from regate_ds.config import RegateConfig
from regate_ds.cost.flops import RowCounts, plan_flops, rows_flops, tower_flops
from regate_ds.cost.shape import ModelShape, shape_of
from regate_ds.families.table import family_of
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import corpus_student
from regate_ds.recipe.students.trainable import trainable


def run_host(config: RunConfig) -> Any:
    """Return the model of a run's student, on "meta", with what it trains."""
    student = corpus_student(config, weights=False)
    model: Any = trainable(student, config.model, seed=0)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run_shape(host: Any) -> ModelShape:
    """Return the shape of a run's model, its tower included."""
    return shape_of(host, family_of(host).tower_of(host))


def ran_flops(
    shape: ModelShape, elision: RegateConfig, plan: StepPlan | None, window: Sequence[TokenBatch]
) -> float:
    """Return the FLOPs of this data rank's micro-batches.

    plan: None is the host's own step, whose head runs at every position.
    """
    total = sum(_tower(shape, batch) for batch in window)
    if plan is None:
        return total + sum(rows_flops(shape, _host_rows(batch), ()) for batch in window)
    spans = elision.execution.spans(elision.first_layer, elision.last_layer or shape.depth)
    return total + sum(plan_flops(shape, micro, spans) for micro in plan.micro)


def _host_rows(batch: TokenBatch) -> RowCounts:
    count, length = batch.labels_BT.shape
    every = count * length
    return RowCounts(count=count, length=length, slots=length, kept=every, num_targets=every)


def _tower(shape: ModelShape, batch: TokenBatch) -> float:
    if shape.tower is None or batch.image_BT is None:
        return 0.0
    sizes: list[int] = []
    for image_T in batch.image_BT:
        found = torch.bincount(image_T[image_T >= 0]).tolist()
        sizes += [size for size in found if size]
    return tower_flops(shape.tower, sizes)
