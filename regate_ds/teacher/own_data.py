"""Reference losses of a data set of users' own, in the words of their training loop.

Shapes: S positions of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from regate_ds.data.answer_index import AnswerIndex
from regate_ds.data.encode import EncodedSample
from regate_ds.data.host_batch import HostCollate, Keyed
from regate_ds.parallel.layout import ProcessGroup
from regate_ds.teacher.identity import teacher_id
from regate_ds.teacher.online import OnlineReference, WindowScorer, samples_of
from regate_ds.teacher.precompute import TeacherJob, Throughput, precompute
from regate_ds.teacher.text_only import score_samples


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen causal language model with the student's tokenizer."""

    model: nn.Module
    pad_id: int
    """The token that it reads in place of images."""

    image_token_id: int | None = None
    """The placeholder of an image in the student's input; None where there are no images."""

    tokens_per_batch: int = 8192
    """Upper limit of padded tokens in a forward pass; a longer sample is one of its own."""

    def online(self, index: AnswerIndex | None = None) -> OnlineReference:
        """A ``reference`` for ``attach`` that scores while training: no store, no pass before.

        index: of the data, where it is known and does not change; samples are compared with it.
        """
        model = self.model.eval()
        scorer = WindowScorer(
            score=partial(score_samples, model, pad_id=self.pad_id),
            tokens_per_batch=self.tokens_per_batch,
        )
        return OnlineReference(
            scorer,
            partial(samples_of, image_token_id=self.image_token_id),
            teacher_id=teacher_id(model, pad_id=self.pad_id),
            index=index,
            model=model,
        )


def score_dataset(
    data: Keyed,
    collate_fn: Callable[[list[Any]], Any],
    teacher: Teacher,
    store: str | Path,
    group: ProcessGroup | None = None,
) -> Throughput:
    """Write the store that ``attach`` reads, for the same keys and labels. Resumable.

    data, collate_fn: those of the training loop; labels as Hugging Face models take them.
    group: ranks that share the work; all of them call it.

    ValueError names the sample, or the store, that does not fit.
    """
    collate = HostCollate(collate_fn)

    def sample(number: int) -> EncodedSample:
        (only,) = samples_of(collate([data[number]]), teacher.image_token_id)
        return only

    model = teacher.model.eval()
    job = TeacherJob(
        index=AnswerIndex.build(sample(number) for number in range(len(data))),
        encode=sample,
        score=partial(score_samples, model, pad_id=teacher.pad_id),
        teacher_id=teacher_id(model, pad_id=teacher.pad_id),
        store=Path(store),
        tokens_per_batch=teacher.tokens_per_batch,
    )
    return precompute(job, group, next(model.parameters()).device)
