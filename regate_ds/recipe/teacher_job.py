"""The job of `regate teacher`: score the training set into a store, on all ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from regate_ds.job.ranks import announce
from regate_ds.job.supervise import join_job
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import open_corpus
from regate_ds.recipe.preflight import judge_teacher, require_one_data_set
from regate_ds.recipe.teacher import TeacherText, own_samples, teacher_source, teacher_text
from regate_ds.teacher.precompute import TeacherJob, precompute
from regate_ds.teacher.scoring import score_samples
from regate_ds.teacher.sharding.placement import place_teacher
from regate_ds.teacher.throughput import plain_forward


def run_teacher(config: RunConfig) -> None:
    """Score the training set with the teacher into `teacher.store`; keep finished shards."""
    judge_teacher(config, announce().world_size)
    assert config.teacher.store is not None
    with join_job("teacher") as process:
        # If the teacher is another model, the student's weights are not needed.
        corpus = open_corpus(config, weights=config.teacher.path is None)
        require_one_data_set(corpus.index.fingerprint, process)
        text = teacher_text(config.teacher, corpus)
        source = teacher_source(config.teacher, corpus)
        teacher = place_teacher(config.teacher, source, text.pad_id, process)
        job = TeacherJob(
            index=corpus.index,
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
            size = f"{corpus.index.num_samples} samples, {corpus.index.num_tokens} answer tokens"
            print(f"teacher: {done}; {config.teacher.store} is complete with {size}")


def _plain(config: RunConfig, model: nn.Module, text: TeacherText) -> Any:
    """Return the forward pass that scoring is compared with; None if the teacher is sharded."""
    if config.teacher.sharding != "none":
        return None
    forward = partial(plain_forward, model, pad_id=text.pad_id)
    return forward if text.tokenizer is None else lambda samples: forward(own_samples(samples))
