"""Reference losses of a teacher with a tokenizer of its own.

It reads the very text of the sample, template included, in its own tokens, with its pad token at
every image position. Its losses come back over the characters of the answers: see ``alignment``.

Shapes: S positions of the student's sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, SampleKey
from regate_ds.data.llava.encode import EncodedSample, Encoder
from regate_ds.data.llava.records import Record, SampleError
from regate_ds.teacher.scoring import ScoredSample
from regate_ds.teacher.tokenizers.alignment import Alignment, align


@dataclass(frozen=True)
class TwiceWritten:
    """One sample in the student's tokens, which it passes for, and in the teacher's."""

    student: EncodedSample
    teacher: EncodedSample
    """No longer than what the student's labels need."""

    alignment: Alignment

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

    def __init__(self, encoder: Encoder, tokenizer: Any, *, pad_id: int) -> None:
        """``encoder``: the student's. ``tokenizer``: the teacher's, a fast one with an eos."""
        _require_fast(tokenizer)
        self._student, self._whole = encoder, encoder.uncut()
        self._teacher = encoder.uncut(tokenizer, placeholder_id=pad_id)

    def write(self, record: Record) -> TwiceWritten:
        """ValueError names a record that the teacher's tokenizer cannot write as text."""
        self._require_prompt(record)
        sample = self._student.encode(record)
        whole = self._whole.encode(record) if self._student.is_cut(sample) else sample
        try:
            theirs = self._teacher.encode(record)
        except SampleError as error:
            raise ValueError(
                f"{error.bad}, to the teacher's tokenizer; correct it, take it out of the data, or "
                "use another teacher"
            ) from error
        alignment = align(whole.char_spans, theirs.char_spans, num_student=len(sample.char_spans))
        return TwiceWritten(sample, _first_labels(theirs, alignment.num_teacher), alignment)

    def _require_prompt(self, record: Record) -> None:
        """Without one, and without a bos, an answer's first token is predicted by nothing."""
        if not any(e.begins_with_answer(record) for e in (self._student, self._teacher)):
            return
        raise ValueError(
            f"{record.source}, record {record.key[1]}: begins with its answer, whose first token "
            "is predicted by nothing where a tokenizer has no bos; set data.template.user"
        )


def score_twice_written(
    score: Callable[[Sequence[ScoredSample]], Tensor], samples: Sequence[TwiceWritten]
) -> Tensor:
    """fp32 [N]: losses of the student's labels, through what ``score`` says of the teacher's."""
    losses = score([sample.teacher for sample in samples])
    parts = losses.split([sample.alignment.num_teacher for sample in samples])
    shared = [sample.alignment.share_out(part_M) for sample, part_M in zip(samples, parts)]
    return torch.cat(shared)


def tokenizer_id(tokenizer: Any) -> str:
    """Names a fast tokenizer by a hash over its rules and the tokens around a text."""
    rules = tokenizer.backend_tokenizer.to_str()
    around = f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    return hashlib.sha256(f"{around} {rules}".encode()).hexdigest()[:8]


def _first_labels(sample: EncodedSample, num_labels: int) -> EncodedSample:
    """The sample up to the token that is the last of so many labels, as a cut would leave it."""
    places = (sample.labels_S != IGNORE).nonzero().squeeze(1)
    length = int(places[num_labels - 1]) + 2 if num_labels else 1
    labels_S = sample.labels_S[:length].clone()
    labels_S[-1] = IGNORE
    return replace(
        sample,
        input_ids_S=sample.input_ids_S[:length],
        labels_S=labels_S,
        is_placeholder_S=sample.is_placeholder_S[:length],
        char_spans=sample.char_spans[:num_labels],
    )


def _require_fast(tokenizer: Any) -> None:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell the characters "
            "of its tokens; convert it to a fast one"
        )
