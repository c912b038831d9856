"""Reference losses of a data set of users' own, in the words of their training loop.

Shapes: S positions of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regate_ds.data.answer_index import AnswerIndex
from regate_ds.data.encode import EncodedSample
from regate_ds.data.host_batch import HostCollate, Keyed
from regate_ds.parallel.layout import ProcessGroup
from regate_ds.teacher.identity import teacher_id
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
        return _sample(collate, data[number], teacher.image_token_id)

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


def _sample(
    collate: HostCollate, item: dict[str, Any], image_token_id: int | None
) -> EncodedSample:
    batch = collate([item])
    ((key,),) = batch.tokens.keys
    is_real_T = batch.tokens.segment_BT[0] >= 0
    ids_S = batch.inputs["input_ids"][0][is_real_T]
    is_placeholder_S = torch.zeros_like(ids_S, dtype=torch.bool)
    if image_token_id is not None:
        is_placeholder_S = ids_S == image_token_id
    labels_S = batch.tokens.labels_BT[0][is_real_T]
    return EncodedSample(key, ids_S, labels_S, is_placeholder_S, char_spans=(), images=())
