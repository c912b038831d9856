"""Short ways to a configuration and to the plan of one micro-batch, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.execution import Execution
from regate_ds.algorithm.images import ReadOrders
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.quotas.per_sample import PerSample
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.scores.fused import Fused
from regate_ds.algorithm.scores.random import Random
from regate_ds.algorithm.scores.score import ScoreInputs
from regate_ds.algorithm.window import (
    Choice,
    Method,
    count_hard,
    place_images,
    plan_window,
    score_window,
)
from regate_ds.config import RegateConfig
from regate_ds.images_config import ImagesConfig
from regate_ds.settings.section import read_section


def config_of(**knobs: Any) -> RegateConfig:
    """A configuration from its knobs, each by its own name, wherever it stands in a file."""
    placed: dict[str, Any] = {}
    for name, value in knobs.items():
        section, _, inner = RegateConfig.MOVED.get(name, name).partition(".")
        placed[section] = {**placed.get(section, {}), inner: value} if inner else value
    return read_section(RegateConfig, placed, where="")


def gate_layers(
    model: nn.Module,
    *,
    first_layer: int = 1,
    last_layer: int | None = None,
    execution: Execution | None = None,
    **options: Any,
) -> Attachment:
    """Attach to a model alone, by the paper's execution or another."""
    config = RegateConfig(
        first_layer=first_layer,
        last_layer=last_layer,
        execution=execution or Elide(),
        score=Random(),
    )
    return attach_model(model, config, **options)


def plan_sparse(
    batch: TokenBatch, score_N: Tensor, *, token_multiple: int = 1, **knobs: Any
) -> ElisionPlan:
    """The plan of a micro-batch alone, by the paper's quota, in padded rows."""
    return plan_in(RowLayout(multiple=token_multiple), batch, score_N, **knobs)


def plan_ragged(
    batch: TokenBatch, score_N: Tensor, *, token_multiple: int = 1, **knobs: Any
) -> ElisionPlan:
    """The same in ragged rows."""
    rows = RowLayout(row_format="ragged", multiple=token_multiple)
    return plan_in(rows, batch, score_N, **knobs)


def plan_in(
    rows: RowLayout,
    batch: TokenBatch,
    score_N: Tensor,
    *,
    keep_share: float,
    align: Any,
    images: ImagesConfig | None = None,
    step: int = 0,
    read_orders: ReadOrders | None = None,
) -> ElisionPlan:
    """``images``: with which share and ranking image tokens are elided; None keeps them all."""
    chosen = images or ImagesConfig()
    method = Method(
        score=Given(score_N),
        quota=PerSample(),
        execution=Elide(align=align),
        keep_share=keep_share,
        ranking=chosen.ranking,
        image_share=chosen.keep_share,
        fill_rows=chosen.fill_rows,
    )
    values_N = score_window(method, [batch], step=0, reference_N=None, statistics={})
    num_hard_S, _ = count_hard(method, [batch], values_N, state={})
    beyond = None
    if images is not None:
        beyond = place_images(method, [batch], step=step, read_orders=read_orders)
    choice = Choice(values_N=values_N, num_hard_S=num_hard_S, beyond=beyond)
    return plan_window(method, [batch], choice, rows)[0]


@dataclass(frozen=True)
class Given:
    """A score whose values a test has made up."""

    values_N: Tensor
    column = None
    statistics = ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        return self.values_N


def fuse(reference_N: Tensor, difficulty_N: Tensor, **knobs: Any) -> Tensor:
    """The paper's score of one sample."""
    inputs = ScoreInputs(
        step=0,
        keys=(("set", 0),),
        num_labels_S=torch.tensor([len(reference_N)]),
        reference_N=reference_N,
        statistics={"difficulty": difficulty_N},
    )
    return Fused(**knobs)(inputs)
