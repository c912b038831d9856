"""ReGATE in DeepSpeed's own pipeline parallelism, with ZeRO stage 0 or 1.

    student = pipeline_student(model, RegateConfig(), num_stages=2)
    engine, *_ = deepspeed.initialize(model=student, model_parameters=..., config=ds)
    regate = attach_pipeline(engine, total_steps=T, reference=ReferenceStore(path))
    for step in range(T):
        loss = regate.train_batch(iterator)
        regate.step(applied=engine.was_step_applied())

The iterator yields ``Batch`` (inputs and tokens), as ``regate.collate(collate)`` and the collator
in `data/collate.py` make it. DeepSpeed requires that the first and the last stage of a replica read
the same micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from regate_ds.adapters.computed import Computed
from regate_ds.adapters.deepspeed.pipeline_layers import (
    Micro,
    inputs_and_labels,
    names_and_tensors,
    numbered,
)
from regate_ds.adapters.deepspeed.pipeline_student import PipelineStudent
from regate_ds.adapters.plan_wire import Replica
from regate_ds.adapters.run import metrics_of
from regate_ds.adapters.session_state import Opened, open_session
from regate_ds.adapters.window import window_tokens
from regate_ds.algorithm.batch import TokenBatch, host_labels
from regate_ds.algorithm.plan import StepPlan
from regate_ds.data.collate import Batch
from regate_ds.data.keyed import KeyedCollate, PlainCollate
from regate_ds.parallel.layout import ParallelLayout, cpu_group
from regate_ds.stores.image_orders.reader import ImageOrderStore
from regate_ds.stores.reference.reader import ReferenceStore


def attach_pipeline(
    engine: Any,
    *,
    total_steps: int,
    reference: ReferenceStore | None = None,
    orders: ImageOrderStore | None = None,
) -> PipelineRegate:
    """Make this rank's ``PipelineRegate`` for a pipeline engine.

    total_steps: optimizer steps of the whole run; a resume must repeat it.
    orders: the orders of the training set's image tokens; only rankings that read them need them.

    Collective over all ranks of the world. ValueError names what is not supported.
    """
    student = engine.module
    if not isinstance(student, PipelineStudent):
        raise ValueError(
            f"engine.module is a {type(student).__name__}, not a PipelineStudent; make the model "
            "with pipeline_student before deepspeed.initialize"
        )
    computed = Computed(reference, orders)
    computed.require(student.regate_config)
    opened = None
    if student.regate_config.enabled and engine.is_last_stage():
        data = engine.grid.get_data_parallel_group() if engine.dp_world_size > 1 else None
        layout = ParallelLayout(data=data, device=engine.device)
        opened = open_session(student.regate_config, computed, layout, total_steps=total_steps)
    return PipelineRegate(engine, student, _replica(engine), opened)


class PipelineRegate:
    """One rank's part in a run with a pipeline; ``attach_pipeline`` makes it."""

    def __init__(
        self, engine: Any, student: PipelineStudent, replica: Replica, opened: Opened | None
    ) -> None:
        """opened: the session, on ranks of the last stage, which plan."""
        self.config = student.regate_config
        self.plan: StepPlan | None = None
        """The plan of the current step, or of the last one."""
        self._engine, self._student = engine, student
        self._replica, self._opened = replica, opened
        self._losses: dict[int, Tensor] = {}
        """Losses of each micro-batch's targets, of the step that was trained last."""
        self._entropies: dict[int, Tensor] = {}
        """Entropies there, where the score asks for them."""

    def collate(self, collate_fn: Callable[[list[Any]], Any]) -> KeyedCollate | PlainCollate:
        """Wrap your collate function; the items need a ``regate_key``, which ``Keyed`` adds."""
        if not self.config.enabled:
            return PlainCollate(collate_fn)
        return KeyedCollate(collate_fn, self._student.number_images)

    def train_batch(self, iterator: Iterator[Batch]) -> Tensor:
        """Run one optimizer step and return the mean loss over all targets of the step.

        All ranks must call it.
        """
        window: list[Any] = []
        if self.config.enabled:
            make = partial(self._plan_step, window, iterator) if self._opened is not None else None
            self.plan = self._replica.share(make)
        loss = self._engine.train_batch(self._feed(window, iterator, self.plan))
        self._losses, self._entropies = dict(self._student.losses), dict(self._student.entropies)
        return loss

    def step(self, *, applied: bool) -> None:
        """End an optimizer step; ``applied`` is ``engine.was_step_applied()``. All ranks call it.

        An error on the last stage is an error on all stages.
        """
        if not self.config.enabled:
            return
        if self.plan is None:
            raise RuntimeError("step() without a step; call train_batch first")
        self._confirm(partial(self._end, self.plan, applied))

    def _end(self, plan: StepPlan, applied: bool) -> None:
        assert self._opened is not None
        for number, micro in enumerate(plan.micro):
            entropy = {"entropy": self._entropies[number]} if self._entropies else {}
            self._opened.session.record(micro, self._losses[number], **entropy)
        self._opened.session.finish_step(applied=applied)

    def _confirm(self, call: Callable[[], None]) -> None:
        """Call on the last stage; an error there is an error on all stages."""
        self._replica.confirm(call if self._opened is not None else None)

    def eval_batch(self, iterator: Iterator[Batch]) -> Tensor:
        """Return the dense model's mean loss over all targets of one step's micro-batches.

        It reads as many micro-batches as a step has. All ranks must call it.
        """
        window, plan = list[Any](), None
        if self.config.enabled:
            make = partial(self._plan_dense, window, iterator) if self._opened is not None else None
            plan = self._replica.share(make)
        return self._engine.eval_batch(self._feed(window, iterator, plan))

    def save(self, checkpoint_dir: str | Path) -> None:
        """Write schedule and difficulty into a checkpoint folder. All ranks call it."""
        if self.config.enabled:
            self._confirm(lambda: self._require_opened().save(checkpoint_dir))

    def load(self, checkpoint_dir: str | Path) -> None:
        """Load what ``save`` wrote; the number of data ranks may differ from the saved one."""
        if self.config.enabled:
            self._confirm(lambda: self._require_opened().load(checkpoint_dir))

    def metrics(self) -> dict[str, Any]:
        """Return counts of the step planned last, over all data ranks (see ``metrics_of``)."""
        return metrics_of(self)

    def remove(self) -> None:
        """Leave the stages to the host: steps that follow are its own, with its own loss."""
        self.config, self._opened, self.plan = replace(self.config, enabled=False), None, None

    def _require_opened(self) -> Opened:
        assert self._opened is not None
        return self._opened

    def _read(self, window: list[Any], iterator: Iterator[Any]) -> None:
        """Put the step's micro-batches into ``window``."""
        window += itertools.islice(iterator, self._engine.micro_batches)

    def _plan_step(self, window: list[Batch], iterator: Iterator[Batch]) -> StepPlan:
        session = self._require_opened().session
        return session.plan_step(partial(self._tokens, window, iterator))

    def _plan_dense(self, window: list[Batch], iterator: Iterator[Batch]) -> StepPlan:
        """Return a plan of this window that elides nothing, for an evaluation. Collective."""
        session = self._require_opened().session
        return session.plan_evaluation(partial(self._tokens, window, iterator))

    def _tokens(self, window: list[Batch], iterator: Iterator[Batch]) -> list[TokenBatch]:
        """Read a step's micro-batches; ValueError if they cannot make up a step.

        It is read where an error is an error on all stages.
        """
        self._read(window, iterator)
        if len(window) < self._engine.micro_batches:
            raise ValueError(
                f"the data ended after {len(window)} of the step's {self._engine.micro_batches} "
                "micro-batches; give whole steps, or repeat the data"
            )
        tokens = window_tokens(window)
        num_samples = max((len(row) for batch in tokens for row in batch.keys), default=0)
        if num_samples > 1:
            raise ValueError(
                f"a row holds {num_samples} samples, which the pipeline cannot keep apart; give "
                "one sample a row (data.pack_length=null)"
            )
        return tokens

    def _feed(
        self, window: list[Any], iterator: Iterator[Any], plan: StepPlan | None
    ) -> Iterator[Any] | None:
        """Return what the engine reads: for each micro-batch the input tensors and the labels.

        The engine uses the tensors on the first stage and the labels on the last. The plans are put
        where this stage's layers look them up. None on stages that read no data.
        """
        engine, student = self._engine, self._student
        reads = engine.is_first_stage() or engine.is_last_stage()
        if reads and not window:
            self._read(window, iterator)
        student.losses.clear()
        student.entropies.clear()
        if plan is not None:
            # The engine divides by micro-batches and data ranks, where we divide by all targets.
            divisor = engine.dp_world_size * engine.micro_batches
            student.scale = divisor / max(1, plan.num_targets_global)
        batches = window if reads else [{}] * engine.micro_batches
        names, feed = [], []
        for number, batch in enumerate(batches):
            inputs, labels = inputs_and_labels(batch)
            if plan is None and isinstance(batch, Batch):
                labels = host_labels(labels)
            input_names, tensors = (
                names_and_tensors(inputs) if engine.is_first_stage() else ((), ())
            )
            names.append(input_names)
            feed.append(((*tensors, numbered(number, engine.device)), labels))
        micro = [None] * len(batches)
        if plan is not None:
            micro = [one.to(engine.device) for one in plan.micro]
        student.table.micro = tuple(Micro(*pair) for pair in zip(micro, names, strict=True))
        return iter(feed) if reads else None


def _replica(engine: Any) -> Replica:
    """Return the stages of this rank's replica; its last one plans.

    ValueError if the pipeline has a model axis, which is not supported.
    """
    grid = engine.grid
    if grid.model_parallel_size > 1:
        raise ValueError(
            f"the pipeline's model axis has size {grid.model_parallel_size}, but tensor "
            "parallelism is not supported here; set it to 1"
        )
    planner = grid.stage_to_global(grid.pipe_parallel_size - 1)
    return Replica(planner, cpu_group(grid.pipe_groups))
