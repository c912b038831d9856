"""Reference losses of a teacher with a tokenizer of its own.

The teacher reads the same text of a sample, template included, in its own tokens, with its pad
token at every image position. Its losses are shared out by characters: see ``alignment.py``.

Shapes: S positions of the student's sample, M label positions of the teacher's, N of the student's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, SampleKey
from regate_ds.data.interfaces import RecordEncoder
from regate_ds.data.llava.records import Record, SampleError
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.teacher.scoring import ScoredSample
from regate_ds.teacher.tokenizers.alignment import Alignment, align


@dataclass(frozen=True)
class TwiceWritten:
    """One sample in the student's tokens and in the teacher's; it counts as the student's."""

    student: EncodedSample
    teacher: EncodedSample
    """The teacher's sample, no longer than the student's labels need."""

    alignment: Alignment
    """How to share the teacher's losses out over the student's labels."""

    @property
    def key(self) -> SampleKey:
        return self.student.key

    @property
    def input_ids_S(self) -> Tensor:
        return self.student.input_ids_S

    @property
    def labels_S(self) -> Tensor:
        return self.student.labels_S

    @property
    def is_placeholder_S(self) -> Tensor:
        return self.student.is_placeholder_S


class OtherTokenizer:
    """Writes records in both tokenizers' tokens."""

    def __init__(self, encoder: RecordEncoder, tokenizer: Any, *, pad_id: int) -> None:
        """Set up for a student's ``encoder`` and a teacher's fast ``tokenizer`` with an eos."""
        _require_fast(tokenizer)
        self._student, self._uncut_student = encoder, encoder.uncut()
        try:
            self._teacher = encoder.uncut(tokenizer, placeholder_id=pad_id)
        except ValueError as error:
            raise ValueError(
                f"the teacher's tokenizer cannot write the samples: {error}; use another teacher"
            ) from error
        # A chat template decides what the teacher reads as much as the tokenizer does.
        self.id = tokenizer_id(tokenizer, self._teacher.settings().get("chat_template", ""))

    def write(self, record: Record) -> TwiceWritten:
        """Encode a record twice. ValueError names one that the teacher's tokenizer cannot write."""
        self._require_prompt(record)
        sample = self._student.encode(record)
        uncut = self._uncut_student.encode(record) if self._student.is_cut(sample) else sample
        try:
            teachers = self._teacher.encode(record)
        except SampleError as error:
            raise ValueError(
                f"{error.bad}, to the teacher's tokenizer; correct it, take it out of the data, or "
                "use another teacher"
            ) from error
        num_student = len(sample.char_spans)
        alignment = align(uncut.char_spans, teachers.char_spans, num_student=num_student)
        return TwiceWritten(sample, _first_labels(teachers, alignment.num_teacher), alignment)

    def _require_prompt(self, record: Record) -> None:
        """Refuse a record that starts with its answer: without a bos, nothing predicts its first
        token."""
        if not any(e.begins_with_answer(record) for e in (self._student, self._teacher)):
            return
        raise ValueError(
            f"{record.source}, record {record.key[1]}: begins with its answer, so that no token "
            "predicts the first one where a tokenizer has no bos; set data.template.user"
        )


def score_twice_written(
    score: Callable[[Sequence[ScoredSample]], Tensor], samples: Sequence[TwiceWritten]
) -> Tensor:
    """Return fp32 [N]: losses of the student's labels, from ``score`` of the teacher's samples."""
    losses = score([sample.teacher for sample in samples])
    parts = losses.split([sample.alignment.num_teacher for sample in samples])
    shared = [sample.alignment.share_out(part_M) for sample, part_M in zip(samples, parts)]
    return torch.cat(shared)


def tokenizer_id(tokenizer: Any, chat_template: str = "") -> str:
    """Name a fast tokenizer by a hash over its rules, its bos, its eos and the chat template."""
    rules = tokenizer.backend_tokenizer.to_str() + chat_template
    around = f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    return hashlib.sha256(f"{around} {rules}".encode()).hexdigest()[:8]


def _first_labels(sample: EncodedSample, num_labels: int) -> EncodedSample:
    """Cut a sample after the token that is its last of ``num_labels`` labels."""
    places = (sample.labels_S != IGNORE).nonzero().squeeze(1)
    length = int(places[num_labels - 1]) + 2 if num_labels else 1
    labels_S = sample.labels_S[:length].clone()
    labels_S[-1] = IGNORE
    return replace(
        sample,
        input_ids_S=sample.input_ids_S[:length],
        labels_S=labels_S,
        image_S=sample.image_S[:length],
        char_spans=sample.char_spans[:num_labels],
    )


def _require_fast(tokenizer: Any) -> None:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not give the characters "
            "of its tokens; convert it to a fast one"
        )
