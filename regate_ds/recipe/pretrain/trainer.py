"""One run of `regate pretrain`: rows, an objective's module, an engine, and a loop over steps."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml

from regate_ds.job.preemption import Preempted, StopRequest, listening
from regate_ds.job.process import Process
from regate_ds.job.progress import progress
from regate_ds.job.ranks import announce
from regate_ds.job.supervise import join_job
from regate_ds.parallel.collectives import sum_over
from regate_ds.recipe.order import Order
from regate_ds.recipe.preflight import judge_folder, require_one_data_set
from regate_ds.recipe.pretrain.config import PretrainTree, load_pretrain
from regate_ds.recipe.pretrain.engine import Asked, PretrainEngine
from regate_ds.recipe.pretrain.models import build_module
from regate_ds.recipe.pretrain.rows import PretrainRows, RowSource, open_rows
from regate_ds.recipe.run_folder import RunFolder
from regate_ds.recipe.saving.checkpoint import (
    choose_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    writing,
)
from regate_ds.recipe.saving.contents import Checkpoint, Done
from regate_ds.recipe.saving.one_job import only_job
from regate_ds.settings.section import plain_values
from regate_ds.stores.atomic_file import sync_files

_HELD_OUT_STEP = -1
"""In the place of a step's number: held-out rows are asked the same in each evaluation."""


def pretrain(config: PretrainTree) -> dict[str, Any]:
    """Train one run and return its figures (empty on ranks other than the first)."""
    announce()
    with (
        join_job("pretrain") as process,
        only_job(config.run.out, is_first=process.is_first),
    ):
        return Pretraining(config, process).run()


class Pretraining:
    """Builds the run in order; ``run`` trains it to its end."""

    def __init__(
        self, config: PretrainTree, process: Process, rows: PretrainRows | None = None
    ) -> None:
        """Build the run. rows: those of ``config.data``, if they have been opened already."""
        self.config, self.process = config, process
        self.folder = RunFolder(config.run.out)
        if process.is_first:
            judge_folder(config, load_pretrain)
        self.rows = rows or open_rows(config.data)
        require_one_data_set(self.rows.fingerprint, process)
        run = config.run
        self.order = Order(
            num_samples=len(self.rows.train),
            micro_batch=run.micro_batch,
            accumulation=run.accumulation,
            rank=process.rank,
            world_size=process.world_size,
            seed=run.seed,
            total_steps=run.steps,
        )
        self._saved = self._find_saved()
        module = build_module(config, self.rows.inputs, longest=self.rows.longest)
        self.engine = PretrainEngine.build(module, config, process, self._saved)

    def run(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint if the configuration says so."""
        run = self.config.run
        torch.manual_seed(run.seed * 1_000 + self.process.rank)
        start = self._begin() if self._saved is None else self._resume(self._saved)
        show = self.process.is_first
        bar = progress(run.steps, desc=run.out.name, unit="step", start=start, show=show)
        with bar, listening(run.grace_seconds) as stop:
            numbers = iter(replace(self.order, start_step=start))
            for step in range(start, run.steps):
                row = self._train_step(step, [next(numbers) for _ in range(run.accumulation)])
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                self._after(step + 1, stop)
        return self._finish(start)

    def _train_step(self, step: int, numbers: list[list[int]]) -> dict[str, Any]:
        """Run one optimizer step and return its row of the metrics. Collective."""
        clocks, lr = (time.perf_counter(), time.process_time()), self.engine.lr
        window = [self.asked(self.rows.train, own, step) for own in numbers]
        means = self.engine.run_step(window)
        weights = self.config.objective.weights
        row = {
            "step": step,
            "loss": sum(weights[name] * mean for name, mean in means.items()),
            **{f"loss_{name}": mean for name, mean in means.items()},
            "lr": lr,
            "step_seconds": time.perf_counter() - clocks[0],
            "cpu_seconds": time.process_time() - clocks[1],
        }
        if not math.isfinite(row["loss"]):
            raise RuntimeError(
                f"step {step}: the loss is {row['loss']}; lower optimizer.lr, or resume from an "
                "earlier checkpoint"
            )
        if self.process.is_first:
            self.folder.append_metrics(row)
        return row

    def asked(self, source: RowSource, numbers: list[int], step: int) -> Any:
        rows, seed = source.rows(numbers), self.config.run.seed
        return rows, self.config.objective.draw(rows, self.rows.inputs, seed=seed, step=step)

    def _after(self, done: int, stop: StopRequest) -> None:
        run = self.config.run
        (num_asked,) = sum_over([int(stop.is_asked)], self.process.group, self.process.device)
        if num_asked and done < run.steps:
            self._stop(done)
        if run.save_every and done % run.save_every == 0 and done < run.steps:
            self._save(done)
        if run.eval_every and done % run.eval_every == 0 and done < run.steps:
            self._evaluate(done)

    def _stop(self, done: int) -> NoReturn:
        self._save(done)
        text = (
            f"asked to end: saved {self.folder.checkpoints} after {done} of "
            f"{self.config.run.steps} steps; go on with run.resume=true"
        )
        raise Preempted(text if self.process.is_first else "")

    def _begin(self) -> int:
        if self.process.is_first:
            text = yaml.safe_dump(plain_values(self.config), sort_keys=False)
            self.folder.begin(text, may_hold_unsaved=self.config.run.resume == "auto")
        return 0

    def _find_saved(self) -> Checkpoint | None:
        resumes = self.process.is_first and self.folder.resumes(self.config.run.resume)
        saved = choose_checkpoint(self.folder.checkpoints, self.process, resumes=resumes)
        if saved is not None:
            saved.done.require(self.rows.fingerprint, self.order.samples_per_step)
        return saved

    def _resume(self, saved: Checkpoint) -> int:
        load_checkpoint(saved, self.engine, self.process, "")  # type: ignore[arg-type]
        if self.process.is_first:
            self.folder.forget_after(saved.done.step)
        return saved.done.step

    def _save(self, done: int) -> None:
        state = Done(
            step=done,
            fingerprint=self.rows.fingerprint,
            samples_per_step=self.order.samples_per_step,
            num_ranks=self.process.world_size,
            figures=self.folder.figures_before(done) if self.process.is_first else "",
        )
        save_checkpoint(self.folder.checkpoints, state, self.engine, self.process)  # type: ignore[arg-type]
        if self.process.is_first:
            prune_checkpoints(self.folder.checkpoints, self.config.run.keep_checkpoints)

    def _evaluate(self, done: int) -> dict[str, float]:
        """Return the mean of each term on held-out rows. Collective."""
        means = self.engine.mean_losses(self._held_out())
        scores = {f"held_out_{name}": mean for name, mean in means.items()}
        if self.process.is_first:
            self.folder.append_eval({"step": done, **scores})
        return scores

    def _held_out(self) -> Asked:
        source, size = self.rows.held_out, self.config.run.micro_batch
        own = range(min(len(source), self.config.run.eval_rows))
        own = own[self.process.rank :: self.process.world_size]
        parts = [list(own[at : at + size]) for at in range(0, len(own), size)]
        return [self.asked(source, part, _HELD_OUT_STEP) for part in parts]

    def _finish(self, start: int) -> dict[str, Any]:
        total = self.config.run.steps
        if start < total:
            self._save(total)
        scores = self._evaluate(total)
        if self.process.is_first:
            self._write_model(self.folder.model)
        dist.barrier()
        if not self.process.is_first:
            return {}
        metrics = self.folder.metrics()
        summary = {
            **scores,
            "loss": metrics[-1]["loss"],
            "train_seconds": sum(row["step_seconds"] for row in metrics),
            "train_cpu_seconds": sum(row["cpu_seconds"] for row in metrics),
            "steps": total,
            "world_size": self.process.world_size,
        }
        self.folder.write_summary(summary)
        return summary

    def _write_model(self, folder: Path) -> None:
        """Write the main model and the tokenizer; helper and heads stay in the checkpoint."""
        with writing(folder):
            self.engine.module.main.body.save_pretrained(folder)  # type: ignore[union-attr]
            self.rows.tokenizer.save_pretrained(folder)
            sync_files(folder)
