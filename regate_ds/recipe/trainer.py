"""One training run: its parts are built in order, then a loop trains on windows and evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader

from regate_ds.data.collate import Batch
from regate_ds.job.preemption import Preempted, StopRequest, leave_to_parent, listening
from regate_ds.job.process import Process
from regate_ds.job.progress import progress
from regate_ds.job.ranks import announce
from regate_ds.job.supervise import join_job
from regate_ds.job.watch import Signs
from regate_ds.recipe.computed import open_computed, origin_of
from regate_ds.recipe.config.length import judge_length
from regate_ds.recipe.config.tree import RunConfig, dump_config
from regate_ds.recipe.corpus import Corpus, HostLabels, held_out, loads_whole, open_corpus
from regate_ds.recipe.engines.base import Setup
from regate_ds.recipe.engines.choose import data_ranks, make_engine
from regate_ds.recipe.estimate.plan_walk import walk_plan
from regate_ds.recipe.estimate.ran import ran_flops, run_host, run_shape
from regate_ds.recipe.evaluation.words import evaluate_by
from regate_ds.recipe.order import make_order
from regate_ds.recipe.preflight import describe_run, judge_folder, judge_run, require_one_data_set
from regate_ds.recipe.run_folder import RunFolder, totals
from regate_ds.recipe.saving.checkpoint import (
    choose_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from regate_ds.recipe.saving.contents import Checkpoint, Done
from regate_ds.recipe.saving.model import merge_lora, save_adapters, save_model
from regate_ds.recipe.saving.one_job import only_job
from regate_ds.recipe.step_figures import StepFigures, gated_share, peak_memory, shown


def train(config: RunConfig) -> dict[str, Any]:
    """Train one run and return its figures (empty on ranks other than the first)."""
    if not config.run.plan_only:  # WORLD_SIZE alone may say for how many ranks a plan is.
        announce()
    judge_run(config)
    if config.run.plan_only:
        return walk_plan(config, open_corpus(config, weights=False))
    made: list[Trainer] = []
    signs = Signs(lambda: made[0].place if made else "its start", config.run.hang_seconds)
    with (
        join_job("train", signs) as process,
        only_job(config.run.out, is_first=process.is_first),
    ):
        if process.is_first:
            judge_folder(config)  # Another job may have begun or ended a run there.
        made.append(Trainer(config, open_corpus(config, weights=loads_whole(config)), process))
        return made[0].run()


class Trainer:
    """Builds the run in order; ``run`` trains it to its end."""

    def __init__(self, config: RunConfig, corpus: Corpus, process: Process) -> None:
        self.config, self.corpus, self.process = config, corpus, process
        self.place = "its start"
        """What this rank is doing, for the others if it is lost."""
        self.data = data_ranks(config, process)
        require_one_data_set(corpus.index.fingerprint, process)
        self.order = make_order(config, corpus, self.data)
        judge_length(config.elision, self.order.total_steps)
        self.folder = RunFolder(config.run.out)
        self._saved = self._find_saved()
        self.computed = open_computed(config, corpus, process)
        self._gated_share = gated_share(corpus.student.model, config.elision)
        self.engine = make_engine(
            Setup(
                config=config,
                corpus=corpus,
                process=process,
                data=self.data,
                total_steps=self.order.total_steps,
                computed=self.computed,
                saved=self._saved,
            )
        )
        shape = run_shape(run_host(config))
        flops = partial(ran_flops, shape, config.elision)
        self._figures = StepFigures(self.engine, process, self.data, flops)

    def run(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint if the configuration says so."""
        if self.process.is_first:
            total = self.order.total_steps
            print(describe_run(self.config, total, origin_of(self.computed)), flush=True)
        torch.manual_seed(self.config.run.seed * 1_000 + self.data.rank)
        start = self._begin() if self._saved is None else self._resume(self._saved)
        total, show = self.order.total_steps, self.process.is_first
        name = self.config.run.out.name
        bar = progress(total, desc=name, unit="step", start=start, show=show)
        with bar, listening(self.config.run.grace_seconds) as stop:
            windows = self.engine.windows(self.loader(start))
            self._figures.lap()
            for step, window in enumerate(windows, start):
                row = self.train_step(step, window, stop)
                bar.update()
                if step % self.config.run.log_every == 0:
                    bar.set_postfix(**shown(row))
                if self._figures.must_stop and step + 1 < total:
                    self._stop(step + 1)
                self._after(step + 1)
        return self._finish(start)

    def _begin(self) -> int:
        if self.process.is_first:
            may_restart = self.config.run.resume == "auto"
            self.folder.begin(dump_config(self.config), may_hold_unsaved=may_restart)
        if self.config.run.eval_every:
            self._evaluate(0)
        return 0

    def loader(self, start: int) -> Iterator[Batch]:
        """Return this rank's micro-batches from step ``start`` on."""
        host_only = not self.config.elision.enabled
        loader = DataLoader(
            self.corpus.train,
            batch_sampler=replace(self.order, start_step=start),  # type: ignore[arg-type]
            collate_fn=HostLabels(self.corpus.collator) if host_only else self.corpus.collator,
            num_workers=self.config.data.num_workers,
            # Without this generator, the loader would draw a seed from the run's random state.
            generator=torch.Generator(),
            worker_init_fn=leave_to_parent,
        )
        return self._figures.watch(loader)

    def train_step(self, step: int, window: Any, stop: StopRequest) -> dict[str, Any]:
        """Run one optimizer step and return its row of the metrics. Collective."""
        self.place = f"step {step}"
        lr = self.engine.lr
        losses = self.engine.run_step(window)
        loss_mean = self._figures.mean_loss(step, losses, is_asked_to_stop=stop.is_asked)
        self.engine.end_step()
        row = {**self._figures.row(step, loss_mean), "lr": lr}
        if self.process.is_first:
            self.folder.append_metrics(row)
        return row

    def _stop(self, done: int) -> NoReturn:
        """Save and end on all ranks, after the step in which one of them was asked to end."""
        self._save(done)
        text = (
            f"asked to end: saved {self.folder.checkpoints} after {done} of "
            f"{self.order.total_steps} steps; go on with run.resume=true"
        )
        raise Preempted(text if self.process.is_first else "")

    def _after(self, done: int) -> None:
        run, last = self.config.run, self.order.total_steps
        # Save before evaluating, so that an evaluation that fails loses nothing.
        if run.save_every and done % run.save_every == 0 and done < last:
            self._save(done)
        if self._evaluates_after(done):
            self._evaluate(done)
        self._figures.lap()

    def _evaluates_after(self, done: int) -> bool:
        every = self.config.run.eval_every
        return bool(every) and done % every == 0 and done < self.order.total_steps

    def _save(self, done: int) -> None:
        checkpoints = self.folder.checkpoints
        state = Done(
            step=done,
            fingerprint=self.corpus.index.fingerprint,
            samples_per_step=self.order.samples_per_step,
            num_ranks=self.process.world_size,
            layout=self.config.layout,
            figures=self.folder.figures_before(done) if self.process.is_first else "",
        )
        save_checkpoint(checkpoints, state, self.engine, self.process)
        if self.process.is_first:
            prune_checkpoints(checkpoints, self.config.run.keep_checkpoints)

    def _find_saved(self) -> Checkpoint | None:
        """Return what the run goes on from, which must be of the same samples in the same steps."""
        resumes = self.process.is_first and self.folder.resumes(self.config.run.resume)
        saved = choose_checkpoint(self.folder.checkpoints, self.process, resumes=resumes)
        if saved is not None:
            saved.done.require(self.corpus.index.fingerprint, self.order.samples_per_step)
        return saved

    def _resume(self, saved: Checkpoint) -> int:
        load_checkpoint(saved, self.engine, self.process, self.config.layout)
        done = saved.done.step
        if self.process.is_first:
            if self.folder.figures_before(done) != saved.done.figures:
                print(
                    f"{self.folder.path}: the figures of the first {done} steps have been changed"
                )
            self.folder.forget_after(done)
        if self._evaluates_after(done):
            self._evaluate(done)
        return done

    def _evaluate(self, done: int) -> dict[str, Any]:
        """Evaluate the dense model on the held-out samples; the time does not count as training."""
        if not self.corpus.test_records:
            return {}
        with self.engine.answering() as predict:
            scores = evaluate_by(predict, held_out(self.corpus, self.config), self.data)
        if self.process.is_first:
            self.folder.append_eval({"step": done, **scores, **self._totals()})
        return scores

    def _totals(self) -> dict[str, Any]:
        """Return sums over all steps in the metrics file; call it on the first rank only."""
        return totals(self.folder.metrics(), self._gated_share)

    def _write_model(self) -> None:
        weights, model = self.engine.weights(), self.config.model
        student, process = self.corpus.student, self.process
        if model.lora is not None:
            save_adapters(self.folder.adapter, student, weights, model, process)
            weights = merge_lora(weights, model.lora)
        save_model(self.folder.model, student, weights, process)

    def _finish(self, start: int) -> dict[str, Any]:
        total = self.order.total_steps
        if start < total:
            self._save(total)
        self._write_model()
        scores = self._evaluate(total)
        peak = peak_memory(self.process)
        if not self.process.is_first:
            return {}
        origin = origin_of(self.computed)
        if origin:
            origin["data_fingerprint"] = self.corpus.index.fingerprint
        summary = {
            **scores,
            **self._totals(),
            "peak_memory_bytes": peak,
            "steps": total,
            "world_size": self.process.world_size,
            **origin,
        }
        self.folder.write_summary(summary)
        return summary
