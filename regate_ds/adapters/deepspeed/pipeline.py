"""ReGATE in DeepSpeed's own pipeline parallelism, with ZeRO stage 0 or 1.

    student = pipeline_student(model, RegateConfig(total_steps=T), num_stages=2)
    engine, *_ = deepspeed.initialize(model=student, model_parameters=..., config=ds)
    regate = attach_pipeline(engine, reference=ReferenceStore(path))
    for step in range(T):
        loss = regate.train_batch(iterator)

The iterator yields ``Batch`` (inputs and tokens), as ``KeyedCollate`` and the collator in
`data/collate.py` make it. DeepSpeed requires that the first and the last stage of a replica read
the same micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from regate_ds.adapters.deepspeed.pipeline_layers import (
    Micro,
    names_and_tensors,
    numbered,
)
from regate_ds.adapters.deepspeed.pipeline_student import PipelineStudent
from regate_ds.adapters.plan_wire import Sent, confirm, failing_together, share_plan
from regate_ds.adapters.session_state import Difficulty, load_state, open_session, save_state
from regate_ds.algorithm.batch import TokenBatch, host_labels
from regate_ds.algorithm.plan import StepPlan, plan_dense
from regate_ds.data.collate import Batch
from regate_ds.parallel.collectives import all_or_none
from regate_ds.parallel.layout import ParallelLayout, cpu_group
from regate_ds.session import Regate
from regate_ds.stores.reference.reader import ReferenceStore


def attach_pipeline(engine: Any, *, reference: ReferenceStore | None = None) -> PipelineRegate:
    """Make this rank's ``PipelineRegate`` for a pipeline engine.

    Collective over all ranks of the world. ValueError names what is not supported.
    """
    student = engine.module
    if not isinstance(student, PipelineStudent):
        raise ValueError(
            f"engine.module is a {type(student).__name__}, not a PipelineStudent; make the model "
            "with pipeline_student before deepspeed.initialize"
        )
    return PipelineRegate(engine, student, reference)


class PipelineRegate:
    """One rank's part in a run with a pipeline; ``attach_pipeline`` makes it."""

    def __init__(
        self, engine: Any, student: PipelineStudent, reference: ReferenceStore | None
    ) -> None:
        self.config = student.regate_config
        self.plan: StepPlan | None = None
        """The plan of the step planned last, on ranks of the last stage; None on other ranks."""
        self._engine, self._student = engine, student
        self._session: Regate | None = None
        self._difficulty: Difficulty | None = None
        self._data = engine.grid.get_data_parallel_group() if engine.dp_world_size > 1 else None
        self.planner, self.replica = _replica(engine)
        if self.config.enabled and engine.is_last_stage():
            self._session, self._difficulty = open_session(
                self.config, reference, ParallelLayout(data=self._data), engine.device
            )

    def train_batch(self, iterator: Iterator[Batch]) -> Tensor:
        """Run one optimizer step and return the mean loss over all targets of the step.

        All ranks must call it.
        """
        window = self._read(iterator)
        plans = self._plans(window) if self.config.enabled else None
        loss = self._engine.train_batch(self._feed(window, plans))
        if self.config.enabled:
            self._finish(applied=self._engine.was_step_applied())
        return loss

    def eval_batch(self, iterator: Iterator[Batch]) -> Tensor:
        """Return the dense model's mean loss over all targets of one step's micro-batches.

        It reads as many micro-batches as a step has. All ranks must call it.
        """
        window = self._read(iterator)
        plans = self._dense_plans(window) if self.config.enabled else None
        return self._engine.eval_batch(self._feed(window, plans))

    def save(self, checkpoint_dir: str | Path) -> None:
        """Write schedule and difficulty into a checkpoint folder.

        Every rank of the last stage must call it; on other ranks it does nothing.
        """
        if self._session is not None:
            is_first = self._engine.grid.data_parallel_id == 0
            save_state(Path(checkpoint_dir), self._session, self._difficulty, is_first=is_first)

    def load(self, checkpoint_dir: str | Path) -> None:
        """Load what ``save`` wrote; the number of data ranks may differ from the saved one."""
        if self._session is not None:
            load_state(Path(checkpoint_dir), self._session, self._difficulty)

    def metrics(self) -> dict[str, int | bool] | None:
        """Return counts of the step planned last, over all data ranks.

        The result is None on ranks of other stages than the last, and before the first step.
        """
        if self.plan is None:
            return None
        return {"step": self.plan.step, "dense": self.plan.is_dense, **self.plan.counts}

    def _read(self, iterator: Iterator[Any]) -> list[Any] | None:
        """Read the step's micro-batches; None on stages that read no data."""
        engine = self._engine
        if not (engine.is_first_stage() or engine.is_last_stage()):
            return None
        return list(itertools.islice(iterator, engine.micro_batches))

    def _plans(self, window: list[Batch] | None) -> Sent:
        """Make the step's plan on the last stage and send it to all other stages."""
        planned = None
        if self._session is not None:
            with failing_together(self.planner, self.replica):
                planned = self.plan = self._session.plan_step(lambda: self._step_tokens(window))
            self._student.scale = self._scale(planned.num_targets_global)
        return share_plan(planned, self.planner, self.replica)

    def _dense_plans(self, window: list[Batch] | None) -> Sent:
        """Make a dense plan on the last stage and send it to all other stages."""
        planned = None
        if self._session is not None:
            with failing_together(self.planner, self.replica):
                counted = all_or_none(self._data, self._engine.device, num_values=1)
                with counted as total:
                    micro = tuple(plan_dense(tokens) for tokens in self._step_tokens(window))
                    total.append(sum(plan.num_targets for plan in micro))
            planned = Sent(self._session.step, True, micro)
            self._student.scale = self._scale(max(1, *total))
        return share_plan(planned, self.planner, self.replica)

    def _scale(self, num_targets: int) -> float:
        """Return the factor by which the sum of a micro-batch's losses is multiplied."""
        return self._engine.dp_world_size * self._engine.micro_batches / num_targets

    def _step_tokens(self, window: list[Batch] | None) -> list[TokenBatch]:
        """Return the tokens of a step's micro-batches; ValueError if they cannot make up a step."""
        assert window is not None
        if len(window) < self._engine.micro_batches:
            raise ValueError(
                f"the data ended after {len(window)} of the step's {self._engine.micro_batches} "
                "micro-batches; give whole steps, or repeat the data"
            )
        num_samples = max((len(row) for batch in window for row in batch.tokens.keys), default=0)
        if num_samples > 1:
            raise ValueError(
                f"a row holds {num_samples} samples, which the pipeline cannot keep apart; give "
                "one sample a row (data.pack_length=null)"
            )
        return [batch.tokens for batch in window]

    def _feed(self, window: list[Any] | None, plans: Sent | None) -> Iterator[Any] | None:
        """Return what the engine reads: for each micro-batch the input tensors and the labels.

        The engine uses the tensors on the first stage and the labels on the last. The plans are put
        where this stage's layers look them up. None on stages that read no data.
        """
        engine, student = self._engine, self._student
        student.losses.clear()
        batches = [{}] * engine.micro_batches if window is None else window
        names, feed = [], []
        for number, batch in enumerate(batches):
            inputs, labels = _inputs_and_labels(batch)
            if plans is None and isinstance(batch, Batch):
                labels = host_labels(labels)
            input_names, tensors = (
                names_and_tensors(inputs) if engine.is_first_stage() else ((), ())
            )
            names.append(input_names)
            feed.append(((*tensors, numbered(number, engine.device)), labels))
        micro = (
            [None] * len(batches) if plans is None else [p.to(engine.device) for p in plans.micro]
        )
        student.table.micro = tuple(Micro(*pair) for pair in zip(micro, names, strict=True))
        return None if window is None else iter(feed)

    def _finish(self, *, applied: bool) -> None:
        """End the step on the last stage; an error there becomes an error on all stages."""
        if self._session is not None:
            assert self.plan is not None
            with failing_together(self.planner, self.replica):
                for number, plan in enumerate(self.plan.micro):
                    self._session.record(plan, self._student.losses[number])
                self._session.finish_step(applied=applied)
        confirm(self._session is not None, self.planner, self.replica)


def _inputs_and_labels(batch: Any) -> tuple[dict[str, Any], Any]:
    if isinstance(batch, Batch):
        return batch.inputs, batch.tokens.labels_BT
    inputs = dict(batch)
    return inputs, inputs.pop("labels", torch.zeros(0))


def _replica(engine: Any) -> tuple[int, ProcessGroup | None]:
    """Return the rank that plans for this rank's replica, and the replica's group for CPU memory.

    ValueError if the pipeline has a model axis, which is not supported.
    """
    grid = engine.grid
    if grid.model_parallel_size > 1:
        raise ValueError(
            f"the pipeline's model axis has size {grid.model_parallel_size}, but tensor "
            "parallelism is not supported here; set it to 1"
        )
    return grid.stage_to_global(grid.pipe_parallel_size - 1), cpu_group(grid.pipe_groups)
