"""What the commands `regate train`, `regate teacher` and `regate eval` do."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from regate_ds.job.ranks import announce
from regate_ds.job.supervise import join_job
from regate_ds.recipe.config.tree import RunConfig, load_config
from regate_ds.recipe.corpus import Task, build_task
from regate_ds.recipe.estimate.plan_walk import walk_plan
from regate_ds.recipe.evaluation.generation import evaluate_generated
from regate_ds.recipe.evaluation.words import evaluate
from regate_ds.recipe.preflight import judge_run, judge_teacher, require_one_data_set
from regate_ds.recipe.run_folder import RunFolder
from regate_ds.recipe.teacher import TeacherText, own_samples, teacher_text
from regate_ds.recipe.trainer import Trainer, held_out
from regate_ds.teacher.precompute import TeacherJob, precompute
from regate_ds.teacher.scoring import score_samples
from regate_ds.teacher.sharding.placement import place_teacher, teacher_source
from regate_ds.teacher.throughput import plain_forward

NUM_GENERATED = 100
"""Held-out questions that `regate eval` also answers freely."""


def train(config: RunConfig) -> dict[str, Any]:
    """Train one run and return its summary (empty on ranks other than the first)."""
    announce()
    judge_run(config)
    if config.run.plan_only:
        return _print_on_first(walk_plan(config, _task(config, weights=False)))
    with join_job("train") as process:
        summary = Trainer(config, _task(config), process).run()
        return _print_on_first(summary)


def run_teacher(config: RunConfig) -> None:
    """Score the training set with the teacher into `teacher.store`; finished shards are skipped."""
    judge_teacher(config, announce().world_size)
    assert config.teacher.store is not None
    with join_job("teacher") as process:
        # A teacher of its own needs of the student only its shape.
        task = _task(config, weights=config.teacher.path is None)
        require_one_data_set(task.index.fingerprint, process)
        text = teacher_text(config.teacher, task)
        source = teacher_source(config.teacher, task)
        teacher = place_teacher(config.teacher, source, text.pad_id, process)
        job = TeacherJob(
            index=task.index,
            encode=text.encode,
            score=text.scores(partial(score_samples, teacher.model, pad_id=text.pad_id)),
            teacher_id=text.name(teacher.id),
            store=config.teacher.store,
            tokens_per_batch=config.teacher.tokens_per_batch,
            ranks_per_replica=teacher.ranks_per_replica,
            in_step=teacher.in_step,
            plain=_plain(config, teacher.model, text),
        )
        done = precompute(job, process.group, process.device)
        if process.is_first:
            size = f"{task.index.num_samples} samples, {task.index.num_tokens} answer tokens"
            print(f"teacher: {done}; {config.teacher.store} is complete with {size}")


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Measure a finished run's model on its held-out questions, teacher-forced and answering."""
    run = RunFolder(folder)
    run.require_run()
    if not run.model.is_dir():
        raise ValueError(f"{folder} has no model/: the run is not finished")
    config = load_config(run.config)
    if config.data.test is None:
        raise ValueError(
            f"data.test=None in {run.config}: there is nothing to evaluate on; name held-out "
            "samples there"
        )
    model = replace(config.model, path=run.model, text={}, vision={}, tokenizer=None, lora=None)
    with join_job("eval") as process:
        task = _task(replace(config, model=model))
        student = task.student.model.to(process.device)  # type: ignore[arg-type]
        questions = held_out(task, config)
        scores = {
            **evaluate(student, questions, process),
            **evaluate_generated(student, questions, process, num_samples=NUM_GENERATED),
        }
        return _print_on_first(scores)


def _task(config: RunConfig, *, weights: bool = True) -> Task:
    """The student and its data; the first rank says what was left out."""
    task = build_task(config, weights=weights)
    if task.bad and _is_first():
        print(f"data.skip_bad left out {len(task.bad)} bad records:")
        print("\n".join(f"  {bad}" for bad in task.bad), flush=True)
    if _is_first():
        tell_cut(task, config.data.max_length)
    return task


def tell_cut(task: Task, max_length: int) -> None:
    """Say how many training samples are as long as a sample may be: their ends may be missing."""
    num_full = int((task.index.num_positions >= max_length).sum())
    if num_full:
        print(
            f"{num_full} of {task.index.num_samples} training samples fill data.max_length="
            f"{max_length}: what was longer is cut",
            flush=True,
        )


def _plain(config: RunConfig, model: nn.Module, text: TeacherText) -> Any:
    """What scoring is compared with; a teacher in parts has no plain forward pass."""
    if config.teacher.sharding != "none":
        return None
    forward = partial(plain_forward, model, pad_id=text.pad_id)
    return forward if text.tokenizer is None else lambda samples: forward(own_samples(samples))


def _is_first() -> bool:
    """Before, or without, a process group: as the launcher says."""
    return os.environ.get("RANK", "0") == "0"


def _print_on_first(figures: dict[str, Any]) -> dict[str, Any]:
    if _is_first():
        for name, value in figures.items():
            text = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{name:<26}{'-' if text is None else text}")
    return figures
