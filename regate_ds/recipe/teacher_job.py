"""The job of `regate teacher`: score the training set into a store, on all ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from regate_ds.job.process import Process
from regate_ds.job.ranks import announce
from regate_ds.job.supervise import join_job
from regate_ds.job.watch import Signs
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus, open_corpus
from regate_ds.recipe.preflight import judge_teacher, require_one_data_set
from regate_ds.recipe.student_losses import GainOfImages, student_id, student_losses
from regate_ds.recipe.teacher import TeacherText, own_samples, teacher_source, teacher_text
from regate_ds.teacher.precompute import TeacherJob, precompute
from regate_ds.teacher.scoring import score_samples
from regate_ds.teacher.sharding.placement import place_teacher
from regate_ds.teacher.throughput import plain_forward


def run_teacher(config: RunConfig) -> None:
    """Score the training set into `teacher.store`, by the model that `teacher.column` says; keep
    finished shards."""
    section = config.teacher
    judge_teacher(config, announce().world_size)
    with join_job("teacher", Signs(patience=config.run.hang_seconds)) as process:
        # If the teacher is another model, the student's weights are not needed.
        corpus = open_corpus(config, weights=section.path is None or section.column != "text")
        require_one_data_set(corpus.index.fingerprint, process)
        job = teacher_job(config, corpus, process)
        done = precompute(job, process.group, process.device)
        if process.is_first:
            size = f"{corpus.index.num_samples} samples, {corpus.index.num_tokens} answer tokens"
            print(f"teacher: {done}; {job.store} is complete with {size}")


def teacher_job(config: RunConfig, corpus: Corpus, process: Process) -> TeacherJob:
    """Return the job that computes the store of `teacher.column`. Collective over all ranks."""
    if config.teacher.column == "text":
        return _text_job(config, corpus, process)
    student = student_losses(corpus.student, process.device)
    name = f"student-{student_id(corpus.student)}"
    if config.teacher.column == "student":
        return _job(config, corpus, encode=corpus.train.encode, score=student, teacher_id=name)
    text = _text_job(config, corpus, process)
    return replace(
        text,
        score=GainOfImages(text.score, student),
        teacher_id=f"gain-{text.teacher_id}-{name}",
        plain=None,
    )


def _text_job(config: RunConfig, corpus: Corpus, process: Process) -> TeacherJob:
    text = teacher_text(config.teacher, corpus)
    source = teacher_source(config.teacher, corpus)
    teacher = place_teacher(config.teacher, source, text.pad_id, process)
    return _job(
        config,
        corpus,
        encode=text.encode,
        score=text.scores(partial(score_samples, teacher.model, pad_id=text.pad_id)),
        teacher_id=text.name(teacher.id),
        ranks_per_replica=teacher.ranks_per_replica,
        in_step=teacher.in_step,
        plain=_plain(config, teacher.model, text),
    )


def _job(config: RunConfig, corpus: Corpus, **how: Any) -> TeacherJob:
    assert config.teacher.store is not None
    return TeacherJob(
        index=corpus.index,
        store=config.teacher.store,
        tokens_per_batch=config.teacher.tokens_per_batch,
        column=config.teacher.column,
        **how,
    )


def _plain(config: RunConfig, model: nn.Module, text: TeacherText) -> Any:
    """Return the forward pass that scoring is compared with; None if the teacher is sharded."""
    if config.teacher.sharding != "none":
        return None
    forward = partial(plain_forward, model, pad_id=text.pad_id)
    return forward if text.tokenizer is None else lambda samples: forward(own_samples(samples))
