"""One training run: built in order, then a loop over windows, with evaluations along the way."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from regate_ds.adapters.deepspeed import Window, attach
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.data.collate import Batch
from regate_ds.data.progress import progress
from regate_ds.data.reference_store import ReferenceStore
from regate_ds.parallel.sync import sum_over
from regate_ds.training.checkpoint import (
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    save_model,
)
from regate_ds.training.configuration import RunConfig, dump_config
from regate_ds.training.deepspeed_json import deepspeed_config
from regate_ds.training.evaluate import HeldOut, evaluate
from regate_ds.training.metrics import RunFolder, totals
from regate_ds.training.optimization import make_lr_schedule, make_optimizer
from regate_ds.training.order import Order
from regate_ds.training.preflight import describe_run, require_same_run
from regate_ds.training.process import Process
from regate_ds.training.task import HostLabels, Task, trainable


class Clock:
    """Wall and CPU seconds of this process since the last lap."""

    def __init__(self) -> None:
        self.lap()

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        last, self._last = getattr(self, "_last", now), now
        return now[0] - last[0], now[1] - last[1]


class Trainer:
    """Builds the run in order; ``run`` trains it to its end."""

    def __init__(self, config: RunConfig, task: Task, process: Process) -> None:
        self.config, self.task, self.process = config, task, process
        self.order = make_order(config, len(task.train_records), process)
        config.elision.judge_length(self.order.total_steps)
        self.knobs = config.elision.knobs(self.order.total_steps)
        self.folder = RunFolder(config.run.out)
        self.reference = self._open_reference()
        self.model = trainable(task.student, config.model, seed=config.run.seed)
        self.regate = attach(self.model, self.knobs, reference=self.reference)
        self.engine = self._make_engine()
        self._clock = Clock()
        self._seen: list[TokenBatch] = []

    def run(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint if the configuration says so."""
        if self.process.is_first:
            teacher = None if self.reference is None else self.reference.teacher_id
            total = self.order.total_steps
            print(describe_run(self.config, self.knobs, total, teacher), flush=True)
        torch.manual_seed(self.config.run.seed * 1_000 + self.process.rank)
        start = self._resume() if self.config.run.resume else self._begin()
        total, show = self.order.total_steps, self.process.is_first
        name = self.config.run.out.name
        with progress(total, desc=name, unit="step", start=start, show=show) as bar:
            windows = self.regate.windows(self._loader(start), self.engine)
            self._clock.lap()
            for step, window in enumerate(windows, start):
                row = self._step(step, window)
                bar.update()
                if step % self.config.run.log_every == 0:
                    bar.set_postfix(loss=f"{row['loss']:.3f}", dense=row["dense"])
                self._after(step + 1)
        return self._finish(start)

    def _begin(self) -> int:
        if self.process.is_first:
            self.folder.begin(dump_config(self.config))
        if self.config.run.eval_every:
            self._evaluate(0)
        return 0

    def _open_reference(self) -> ReferenceStore | None:
        """The teacher's losses, refused if they were computed for other data."""
        if not self.config.selects:
            return None
        assert self.config.teacher.store is not None
        store = ReferenceStore(self.config.teacher.store)
        if self.process.is_first:
            store.require(self.task.index().fingerprint)
        return store

    def _make_engine(self) -> Any:
        import deepspeed

        optimizer = make_optimizer(self.model, self.config.optimizer)
        total = self.order.total_steps
        return deepspeed.initialize(
            model=self.model,
            optimizer=optimizer,
            lr_scheduler=make_lr_schedule(optimizer, self.config.optimizer, total),
            config=deepspeed_config(self.config, self.process.world_size),
        )[0]

    def _loader(self, start: int) -> Iterator[Batch]:
        """This rank's micro-batches from a step on; remembers the tokens of the open window."""
        host_only = not self.knobs.enabled
        loader = DataLoader(
            self.task.train,
            batch_sampler=replace(self.order, start_step=start),  # type: ignore[arg-type]
            collate_fn=HostLabels(self.task.collator) if host_only else self.task.collator,
            num_workers=self.config.data.num_workers,
            # Without one of its own, the loader would draw a seed from the run's random state.
            generator=torch.Generator(),
        )
        for batch in loader:
            self._seen.append(batch.tokens)
            yield batch

    def _step(self, step: int, window: Window) -> dict[str, Any]:
        losses, lr = [], self.engine.get_lr()[0]
        for inputs, plan in window:
            output = self.engine(**inputs, **({} if plan is None else {"regate_plan": plan}))
            loss = self.regate.loss(output, plan)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        loss_mean = self._mean_loss(step, losses)
        self.regate.step(applied=self.engine.was_step_applied())
        row = {**self._row(step, loss_mean), "lr": lr}
        if self.process.is_first:
            self.folder.append_metrics(row)
        return row

    def _mean_loss(self, step: int, losses: list[Tensor]) -> float:
        """The step's loss; RuntimeError if it is not finite, on all ranks alike."""
        # Waits for the device, so that the next lap holds the step's own work.
        here = float(torch.stack(losses).sum() / len(losses))
        (loss,) = self._mean(torch.tensor([here], dtype=torch.float64)).tolist()
        if math.isfinite(loss):
            return loss
        bad = zip(losses, self._seen)
        found = [key for one, batch in bad if not math.isfinite(one) for key in batch.flat_keys]
        everywhere: list[Any] = [found]
        if self.process.world_size > 1:
            everywhere = [None] * self.process.world_size
            dist.all_gather_object(everywhere, found)
        names = ", ".join(f"{name} record {number}" for name, number in sum(everywhere, []))
        raise RuntimeError(
            f"step {step}: the loss is {loss}, in a micro-batch of {names or 'unknown samples'}; "
            "nothing of this step is saved: look at them, or resume from a checkpoint and lower "
            "optimizer.lr"
        )

    def _row(self, step: int, loss_mean: float) -> dict[str, Any]:
        seconds, cpu_seconds = self._clock.lap()
        (cpu_mean,) = self._mean(torch.tensor([cpu_seconds], dtype=torch.float64)).tolist()
        counts = self._counts()
        self._seen.clear()
        return {
            "step": step,
            "loss": loss_mean,
            **counts,
            "step_seconds": seconds,
            "cpu_seconds": cpu_mean * self.process.world_size,
            "grad_norm": float(self.engine.get_global_grad_norm() or 0.0),
        }

    def _counts(self) -> dict[str, Any]:
        """Counts of the step over all data ranks; the host's own run keeps all it has."""
        if self.regate.plan is not None:
            return {k: v for k, v in self.regate.metrics().items() if k != "step"}
        tokens = sum(int((batch.segment_BT >= 0).sum()) for batch in self._seen)
        padded = sum(batch.segment_BT.numel() for batch in self._seen) - tokens
        labels = sum(int(batch.is_label_BT.sum()) for batch in self._seen)
        process = self.process
        tokens, labels, padded = sum_over([tokens, labels, padded], process.group, process.device)
        return {
            "dense": True,
            "tokens_total": tokens,
            "tokens_kept": tokens,
            "answer_total": labels,
            "answer_kept": labels,
            "filled": 0,
            "padded": padded,
        }

    def _mean(self, value: Tensor) -> Tensor:
        """Mean over data ranks, as the engine averages their gradients."""
        value = value.to(self.engine.device)
        if self.process.world_size > 1:
            dist.all_reduce(value)
        return value / self.process.world_size

    def _after(self, done: int) -> None:
        run, last = self.config.run, self.order.total_steps
        # First saved, then evaluated: an evaluation that fails loses nothing.
        if run.save_every and done % run.save_every == 0 and done < last:
            self._save(done)
        if self._evaluates_after(done):
            self._evaluate(done)
        self._clock.lap()

    def _evaluates_after(self, done: int) -> bool:
        every = self.config.run.eval_every
        return bool(every) and done % every == 0 and done < self.order.total_steps

    def _save(self, done: int) -> None:
        checkpoints = self.folder.checkpoints
        save_checkpoint(checkpoints, done, self.engine, self.regate, self.process)
        if self.process.is_first:
            prune_checkpoints(checkpoints, self.config.run.keep_checkpoints)

    def _resume(self) -> int:
        self.folder.require_run()
        require_same_run(self.config, self.folder.config)
        done = load_checkpoint(self.folder.checkpoints, self.engine, self.regate, self.process)
        lacks_eval = False
        if self.process.is_first:
            self.folder.forget_after(done)
            lacks_eval = all(row["step"] != done for row in self.folder.evals())
        (lacks_eval,) = sum_over([int(lacks_eval)], self.process.group, self.process.device)
        if lacks_eval and self._evaluates_after(done):
            self._evaluate(done)
        return done

    def _evaluate(self, done: int) -> dict[str, Any]:
        """Dense evaluation on the held-out samples; its time does not count as training."""
        if not self.task.test_records:
            return {}
        scores = evaluate(self.engine.module, held_out(self.task, self.config), self.process)
        if self.process.is_first:
            self.folder.append_eval({"step": done, **scores, **self._totals()})
        return scores

    def _totals(self) -> dict[str, Any]:
        """Sums over all steps so far, as the metrics file has them; first rank only."""
        return totals(self.folder.metrics(), self._gated_share())

    def _gated_share(self) -> float:
        """Gated layers among all layers of the decoder."""
        depth = self.task.student.model.get_decoder().config.num_hidden_layers
        if not self.knobs.enabled:
            return 0.0
        return ((self.knobs.last_layer or depth) - self.knobs.first_layer) / depth

    def _finish(self, start: int) -> dict[str, Any]:
        total = self.order.total_steps
        if start < total:
            self._save(total)
        save_model(self.folder.model, self.task.student, self.model, self.process)
        scores = self._evaluate(total)
        peak = self._peak_memory()
        if not self.process.is_first:
            return {}
        store = self.reference
        origin = store and {"teacher_id": store.teacher_id, "data_fingerprint": store.fingerprint}
        summary = {
            **scores,
            **self._totals(),
            "peak_memory_bytes": peak,
            "steps": total,
            "world_size": self.process.world_size,
            **(origin or {}),
        }
        self.folder.write_summary(summary)
        return summary

    def _peak_memory(self) -> int:
        """Largest memory of any rank, in bytes: of the GPU, or of the process on a CPU."""
        if self.process.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.process.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peaks = torch.tensor(float(peak), dtype=torch.float64, device=self.process.device)
        if self.process.world_size > 1:
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        return int(peaks)


def make_order(config: RunConfig, num_samples: int, process: Process) -> Order:
    """The run's order of samples, and through it the run's length."""
    run = config.run
    order = Order(
        num_samples=num_samples,
        micro_batch=run.micro_batch,
        accumulation=run.accumulation,
        rank=process.rank,
        world_size=process.world_size,
        seed=run.seed,
        total_steps=0,
    )
    return replace(order, total_steps=run.steps or run.epochs * order.steps_per_epoch)


def held_out(task: Task, config: RunConfig) -> HeldOut:
    return HeldOut(
        records=task.test_records,
        encoder=task.encoder,
        tokenizer=task.student.tokenizer,
        vision=task.student.vision,
        num_workers=config.data.num_workers,
    )
