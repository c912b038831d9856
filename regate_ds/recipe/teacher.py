"""How the teacher reads the samples of a corpus: in the student's token ids, or in its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from regate_ds.data.llava.sample import EncodedSample
from regate_ds.recipe.corpus import Corpus
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.config import TeacherConfig
from regate_ds.teacher.host_text import HostText
from regate_ds.teacher.loading import load_teacher_tokenizer
from regate_ds.teacher.precompute import ScoreSamples
from regate_ds.teacher.sharding.placement import TeacherSource, source_at
from regate_ds.teacher.tokenizers.other import (
    OtherTokenizer,
    TwiceWritten,
    score_twice_written,
)
from regate_ds.teacher.tokenizers.same import choose_pad_id, require_same_tokens


@dataclass(frozen=True)
class TeacherText:
    """A corpus's samples as the teacher reads them; made by ``teacher_text``."""

    corpus: Corpus

    pad_id: int
    """Id of the teacher's token that stands at image positions."""

    tokenizer: Any = None
    """The teacher's own tokenizer; None if the teacher reads the student's ids."""

    @cached_property
    def writer(self) -> OtherTokenizer:
        return OtherTokenizer(self.corpus.encoder, self.tokenizer, pad_id=self.pad_id)

    def encode(self, row: int) -> EncodedSample | TwiceWritten:
        """Return the sample at a row of the corpus's index, as ``scores`` takes it."""
        if self.tokenizer is None:
            return self.corpus.train.encode(row)
        return self.writer.write(self.corpus.train_records[row])

    def scores(self, score: ScoreSamples) -> ScoreSamples:
        """Turn a function that scores the teacher's own ids into one for the student's labels."""
        return score if self.tokenizer is None else partial(_score_written, score)

    def name(self, teacher_id: str) -> str:
        """Return the teacher's name, with the id of its own tokenizer: that changes the losses."""
        return teacher_id if self.tokenizer is None else f"{teacher_id}-{self.writer.id}"


def teacher_text(config: TeacherConfig, corpus: Corpus) -> TeacherText:
    """Decide how the teacher reads the corpus.

    ValueError names the first difference between tokenizers that have to be the same.
    """
    own = corpus.student.tokenizer
    if config.path is None:
        return TeacherText(corpus, choose_pad_id(own))
    theirs = load_teacher_tokenizer(config.path)
    pad_id = choose_pad_id(theirs)
    if config.tokenizer == "own":
        return TeacherText(corpus, pad_id, theirs)
    require_same_tokens(own, theirs, placeholder_ids=corpus.student.placeholder_ids)
    return TeacherText(corpus, pad_id)


def own_samples(samples: Sequence[TwiceWritten]) -> list[EncodedSample]:
    """Return the samples in the ids of a teacher that has its own tokenizer."""
    return [sample.teacher for sample in samples]


def _score_written(score: ScoreSamples, samples: Sequence[Any]) -> Tensor:
    return score_twice_written(score, samples)


def teacher_source(section: TeacherConfig, corpus: Corpus) -> TeacherSource:
    """Return the model that `teacher.path` names, or the student's own backbone, not copied."""
    if section.path is not None:
        return source_at(section.path)
    backbone = text_backbone(corpus.student.model)
    empty = backbone.empty if isinstance(backbone, HostText) else None
    return TeacherSource(backbone.config, lambda: backbone, empty=empty)
