"""A job whose teacher is arithmetic: losses that show which samples were read together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from regate_ds.algorithm.batch import IGNORE
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.teacher.precompute import TeacherJob
from regate_ds.teacher.scoring import ScoredSample
from tests.support.samples import make_samples


def score(samples: Sequence[ScoredSample]) -> torch.Tensor:
    """[N]: from each label, its sample's text and the number of samples in the batch."""
    losses = []
    for sample in samples:
        labels_N = sample.labels_S[sample.labels_S != IGNORE]
        losses.append(labels_N / 10 + sample.input_ids_S.sum() % 97 + len(samples) / 100)
    return torch.cat(losses).float()


def make_plain_job(store: Path, num_samples: int = 10, **changes) -> TeacherJob:
    samples = make_samples(num_samples)
    settings = {
        "index": AnswerIndex.build(samples),
        "encode": samples.__getitem__,
        "score": score,
        "teacher_id": "plain",
        "store": store,
        "tokens_per_batch": 48,
    }
    return TeacherJob(**{**settings, **changes})
