"""The arms of `regate bench step` in DeepSpeed's own pipeline: an engine for each arm.

Planning is part of the step there. The baselines are the host's own step and our dense one, whose
head runs on labels alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from regate_ds.adapters.deepspeed.pipeline import PipelineRegate, attach_pipeline
from regate_ds.adapters.deepspeed.pipeline_layers import Decoder
from regate_ds.adapters.deepspeed.pipeline_student import pipeline_student
from regate_ds.cost.shape import shape_of
from regate_ds.recipe.bench.arms import HOST, StepArm
from regate_ds.recipe.bench.case import StepCase, as_loaded, make_data
from regate_ds.recipe.bench.host import ENDLESS, StepParts, plans_followed
from regate_ds.recipe.bench.huggingface import make_model


class PipelineHost:
    """Engines with a stage each on this rank."""

    def __init__(self, case: StepCase, arms: dict[str, StepArm], device: torch.device) -> None:
        import deepspeed

        self._data = make_data(case)
        self._engines: dict[str, tuple[Any, PipelineRegate]] = {}
        for name, arm in arms.items():
            config = replace(arm.config(case), enabled=name != HOST)
            model = make_model(replace(case, recompute=False), device)
            self.shape = shape_of(model)
            student = pipeline_student(
                model,
                config,
                num_stages=case.pipeline,
                partition_method="type:Decoder",
                activation_checkpoint_interval=int(case.recompute),
            )
            optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
            settings = _settings(case)
            engine = deepspeed.initialize(model=student, optimizer=optimizer, config=settings)[0]
            reference: Any = self._data if config.needs_reference else None
            regate = attach_pipeline(engine, total_steps=ENDLESS, reference=reference)
            self._engines[name] = engine, regate
        self.layers: list[nn.Module] = []
        self.weights: list[nn.Parameter] = []

    @contextmanager
    def ready(self, name: str) -> Iterator[StepParts]:
        engine, regate = self._engines[name]
        self.layers = [m for m in engine.module.modules() if isinstance(m, Decoder)]
        batches = as_loaded(self._data.batches)
        yield StepParts(
            plan=lambda: None,
            passes=lambda *_: regate.train_batch(iter(batches)),
            end=lambda *_: regate.step(applied=True),
            followed=partial(plans_followed, regate, batches),
        )


def _settings(case: StepCase) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": case.samples,
        "gradient_accumulation_steps": case.micro_batches,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": case.zero_stage or 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.precision == "bf16"},
    }
