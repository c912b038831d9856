"""`regate teacher`"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from torch import nn

from regate_ds.commands.config_argument import _add_config
from regate_ds.job.ranks import announce
from regate_ds.job.supervise import join_job
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import _task
from regate_ds.recipe.preflight import judge_teacher, require_one_data_set
from regate_ds.recipe.teacher import TeacherText, own_samples, teacher_source, teacher_text
from regate_ds.teacher.precompute import TeacherJob, precompute
from regate_ds.teacher.scoring import score_samples
from regate_ds.teacher.sharding.placement import place_teacher
from regate_ds.teacher.throughput import plain_forward


def _add_teacher(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "compute the reference losses of the training set, once; finished parts are skipped"
    teacher = commands.add_parser("teacher", parents=[debug], help=text, description=text)
    _add_config(teacher)
    teacher.set_defaults(run=_teacher)


def _teacher(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.config.tree import load_config

    config = load_config(args.config, args.overrides)

    from regate_ds.commands.teacher import run_teacher

    run_teacher(config)
    return 0


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


def _plain(config: RunConfig, model: nn.Module, text: TeacherText) -> Any:
    """What scoring is compared with; a teacher in parts has no plain forward pass."""
    if config.teacher.sharding != "none":
        return None
    forward = partial(plain_forward, model, pad_id=text.pad_id)
    return forward if text.tokenizer is None else lambda samples: forward(own_samples(samples))
