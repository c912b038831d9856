"""Build the teacher inside the training job, for `teacher.mode: online`."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

from regate_ds.data.collate import Batch
from regate_ds.job.process import Process
from regate_ds.recipe.corpus import Corpus
from regate_ds.recipe.teacher import TeacherText, teacher_source, teacher_text
from regate_ds.teacher.config import TeacherConfig
from regate_ds.teacher.online import OnlineReference, Read, WindowScorer, samples_of
from regate_ds.teacher.scoring import score_samples
from regate_ds.teacher.sharding.placement import place_teacher
from regate_ds.teacher.tokenizers.other import TwiceWritten


def open_online(section: TeacherConfig, corpus: Corpus, process: Process) -> OnlineReference:
    """Build the teacher; call it before the engine is built. Collective over all ranks.

    If the teacher is the student's own backbone, it is a copy of the weights before training.
    """
    text = teacher_text(section, corpus)
    source = teacher_source(section, corpus)
    if section.path is None:
        backbone = source.load
        source = replace(source, load=lambda: deepcopy(backbone()))
    teacher = place_teacher(section, source, text.pad_id, process)
    scorer = WindowScorer(
        score=partial(score_samples, teacher.model, pad_id=text.pad_id),
        tokens_per_batch=section.tokens_per_batch,
        replica=teacher.layout.replica,
        in_step=teacher.in_step,
        device=process.device,
    )
    return OnlineReference(
        text.scores(scorer),
        _reader(text, corpus),
        teacher_id=text.name(teacher.id),
        index=corpus.index,
        model=teacher.model,
    )


def _reader(text: TeacherText, corpus: Corpus) -> Read:
    """Return a function that reads a micro-batch's samples for the teacher.

    It takes the token ids of the batch; a teacher with its own tokenizer needs the records' text.
    """
    if text.tokenizer is None:
        return partial(samples_of, placeholder_ids=corpus.student.placeholder_ids)

    def read(batch: Batch) -> list[TwiceWritten]:
        rows = corpus.index.rows(batch.tokens.flat_keys)
        return [text.writer.write(corpus.train_records[row]) for row in rows]

    return read
