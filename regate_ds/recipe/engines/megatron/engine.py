"""MegatronEngine: a run's steps through Megatron-core's model, schedule and optimizer.

All ranks of a replica read the samples of their data rank. The plan is made and sent as in a
user's own training loop (regate_ds/adapters/megatron/attach.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from regate_ds.adapters.megatron import MegatronRegate, attach
from regate_ds.adapters.megatron.groups import group_device
from regate_ds.algorithm.plan import StepPlan
from regate_ds.data.collate import Batch
from regate_ds.parallel.resharding import SequenceCut
from regate_ds.recipe.config.megatron_limits import require_student
from regate_ds.recipe.engines.base import Setup
from regate_ds.recipe.engines.megatron.checkpoint.shards import (
    load_random,
    load_shards,
    save_random,
    save_shards,
)
from regate_ds.recipe.engines.megatron.chunks import build_chunks, context_part, student_chunks
from regate_ds.recipe.engines.megatron.export import student_weights
from regate_ds.recipe.engines.megatron.forward import predict_in_stages
from regate_ds.recipe.engines.megatron.optimizer import DTYPES, optimizer_settings
from regate_ds.recipe.engines.megatron.padding import to_one_length, windows
from regate_ds.recipe.evaluation.forward import Predict, dense_inference
from regate_ds.recipe.optimizer import lr_share


@dataclass
class StepResult:
    """The outcome of the last step."""

    applied: bool = False
    grad_norm: float | None = None


class MegatronEngine:
    """Runs this rank's part of each step."""

    def __init__(
        self,
        setup: Setup,
        chunks: list[DistributedDataParallel],
        regate: MegatronRegate,
        optimizer: Any,
    ) -> None:
        self.chunks, self.regate, self.optimizer = chunks, regate, optimizer
        self._setup = setup
        self._schedule = regate.wrap(get_forward_backward_func())
        self._lr_share = lr_share(setup.config.optimizer, setup.total_steps)
        self._num_done, self._last = 0, StepResult()

    @classmethod
    def build(cls, setup: Setup) -> MegatronEngine:
        config, student = setup.config, setup.corpus.student
        assert config.parallel is not None
        reference = setup.computed.reference
        model: Any = student.model
        require_student(model.config.model_type, model.config.get_text_config(), config.parallel)
        dtype = DTYPES[config.run.precision]
        chunks = build_chunks(student, config.model, config.parallel, dtype, config.run.seed)
        # From here on the student is only asked for its shapes and written by its weights' names.
        model.to("meta", dtype)
        regate = attach(
            chunks,
            config.elision,
            total_steps=setup.total_steps,
            reference=reference,
            orders=setup.computed.orders,
            row_format=config.parallel.row_format,
        )
        optimizer = get_megatron_optimizer(
            optimizer_settings(config), [*chunks], use_gloo_process_groups=False
        )
        for group in optimizer.param_groups:
            # Megatron's own scheduler, which is not used here, would set this.
            group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
        return cls(setup, chunks, regate, optimizer)

    @property
    def lr(self) -> float:
        return self._setup.config.optimizer.lr * self._lr_share(self._num_done)

    def windows(self, loader: Iterable[Batch]) -> Iterator[list[Batch]]:
        config, pad_id = self._setup.config, self._setup.corpus.student.pad_id
        size, packs = config.run.accumulation, config.data.pack_length is not None
        return windows(loader, size, pad_id=pad_id, cut=self._cut, packs=packs)

    @property
    def _cut(self) -> SequenceCut:
        """How the ranks cut the rows of micro-batches."""
        parallel = self._setup.config.parallel
        assert parallel is not None
        return SequenceCut(parallel.context, parallel.tensor if parallel.sequence else 1)

    def run_step(self, window: list[Batch]) -> list[Tensor]:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.regate.prepare(window)
        reports = self._run_schedule(window)
        applied, norm, _ = self.optimizer.step()
        clips = self._setup.config.optimizer.grad_clip is not None
        losses = self._losses(reports, len(window))
        self._last = StepResult(bool(applied), float(norm) if clips else None)
        self._num_done += 1
        return losses

    def _run_schedule(self, window: list[Batch]) -> Sequence[dict[str, Tensor]]:
        has_several = len(self.chunks) > 1
        on_device = [batch.to(self._setup.process.device) for batch in window]
        iterators = [iter(on_device) for _ in self.chunks]
        rows, length = window[0].tokens.segment_BT.shape
        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if has_several else iterators[0],
            model=self.chunks if has_several else self.chunks[0],
            num_microbatches=len(window),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=False,
        )

    def _losses(self, reports: Sequence[dict[str, Tensor]], num_micro: int) -> list[Tensor]:
        """Return the micro-batches' losses on every rank, from those of the last stage.

        A loss is the micro-batch's share of the step's loss, times the number of micro-batches and
        data ranks, so that the mean over both is the step's loss.
        """
        sums_M2 = torch.zeros(num_micro, 2, dtype=torch.float64, device=group_device())
        if reports:
            sums_M2 = torch.stack([report["lm loss"] for report in reports]).double()
            if mpu.get_context_parallel_world_size() > 1:
                # Each context rank has the targets of its own positions.
                dist.all_reduce(sums_M2, group=mpu.get_context_parallel_group())
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            last = mpu.get_pipeline_model_parallel_last_rank()
            dist.broadcast(sums_M2, last, group=mpu.get_pipeline_model_parallel_group())
        scale = num_micro * self._setup.data.world_size / self._num_targets(sums_M2)
        return list((sums_M2[:, 0] * scale).cpu())

    def _num_targets(self, sums_M2: Tensor) -> float:
        """Return the step's targets over all data ranks: the plan's, or without one, counted."""
        if self.regate.plan is not None:
            return self.regate.plan.num_targets_global
        num_targets, data = sums_M2[:, 1].sum(), self._setup.data
        if data.group is not None:
            dist.all_reduce(num_targets, group=data.group)
        return float(num_targets)

    def end_step(self) -> None:
        self.regate.step(applied=self._last.applied)

    def plan(self) -> StepPlan | None:
        return self.regate.plan

    def counts(self) -> dict[str, Any] | None:
        return None if self.regate.plan is None else self.regate.metrics()

    def grad_norm(self) -> float | None:
        """Return None if nothing is clipped: Megatron does not measure the norm then."""
        return self._last.grad_norm

    @contextmanager
    def answering(self) -> Iterator[Predict]:
        with ExitStack() as stack:
            for chunk in self.chunks:
                stack.enter_context(dense_inference(chunk))
            yield self._predict

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pad_id = self._setup.corpus.student.pad_id
        (padded,) = to_one_length([batch], pad_id=pad_id, multiple=self._cut.multiple)
        return predict_in_stages(self.chunks, padded.to(self._setup.process.device))

    def weights(self) -> dict[str, Tensor]:
        setup, chunks = self._setup, student_chunks(self.chunks)
        lora = setup.config.model.lora
        return student_weights(setup.corpus.student, chunks, lora, setup.process.device)

    def save(self, checkpoint: Path) -> None:
        save_shards(checkpoint, student_chunks(self.chunks), self.optimizer)
        save_random(checkpoint)
        self.regate.save(checkpoint)

    def load(self, checkpoint: Path) -> None:
        saved = self._setup.saved
        assert saved is not None
        load_shards(checkpoint, student_chunks(self.chunks), self.optimizer)
        if not self._setup.has_other_ranks:
            load_random(checkpoint)
        self._num_done = saved.done.step

    def load_method(self, checkpoint: Path) -> None:
        self.regate.load(checkpoint)


def forward_step(iterator: Iterator[Batch], model: nn.Module) -> Any:
    """Run the next micro-batch as the host does, with a loss over all label positions.

    With elision, ``MegatronRegate.wrap`` replaces that loss by the one over the plan's targets.
    """
    batch = next(iterator)
    lengths = batch.inputs.get("lengths")
    whole_BT = batch.tokens.labels_BT.to(batch.inputs["input_ids"].device)
    labels_BT = context_part(whole_BT, 1, lengths)
    output = model(
        batch.inputs["input_ids"],
        pixel_values=batch.inputs.get("pixel_values"),
        labels=labels_BT.clamp(min=0),
        lengths=lengths,
    )

    def loss(losses_BT: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        is_label_BT = labels_BT >= 0
        total, count = (losses_BT.float() * is_label_BT).sum(), is_label_BT.sum()
        report = torch.stack([total.detach(), count.to(total.dtype)])
        return total, count.int(), {"lm loss": report}

    return output, loss
