"""Encoded samples without a tokenizer, for tests of the stores and the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, SampleKey
from regate_ds.stores.answer_index import AnswerIndex


@dataclass(frozen=True)
class Sample:
    key: SampleKey
    input_ids_S: Tensor
    labels_S: Tensor
    is_placeholder_S: Tensor


def make_sample(number: int, *, prompt: int, answer: int, images: int = 0, vocabulary: int = 60):
    """``images`` placeholders of id ``vocabulary``, a prompt, and an answer, all token ids random.

    Of the answer every token is predicted, so it has ``answer`` label positions.
    """
    generator = torch.Generator().manual_seed(number)
    text = torch.randint(3, vocabulary, (prompt + answer,), generator=generator)
    ids_S = torch.cat([torch.full((images,), vocabulary), text])
    labels_S = torch.full_like(ids_S, IGNORE)
    first = images + prompt
    labels_S[first - 1 : -1] = ids_S[first:]
    return Sample(("set", number), ids_S, labels_S, torch.arange(ids_S.numel()) < images)


def make_samples(num_samples: int) -> list[Sample]:
    """Samples of different lengths, numbered from 10 so that a key is never its row."""
    return [
        make_sample(10 + i, prompt=2 + i % 5, answer=1 + (7 * i) % 11, images=3 * (i % 3))
        for i in range(num_samples)
    ]


def make_index(num_samples: int) -> AnswerIndex:
    return AnswerIndex.build(make_samples(num_samples))
