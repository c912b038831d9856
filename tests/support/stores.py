"""Reference losses and an answer index made of token batches, where a test has no data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey, TokenBatch
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.values import Statistics


@dataclass(frozen=True)
class _Sample:
    key: SampleKey
    labels_S: Tensor

    @property
    def input_ids_S(self) -> Tensor:
        return self.labels_S.roll(1)

    @property
    def is_placeholder_S(self) -> Tensor:
        return torch.zeros_like(self.labels_S, dtype=torch.bool)


def index_of(batches: Iterable[TokenBatch]) -> AnswerIndex:
    """Every sample of the batches once, in order of first sight."""
    samples: dict[SampleKey, _Sample] = {}
    for batch in batches:
        for number, key in enumerate(batch.flat_keys):
            samples.setdefault(key, _Sample(key, batch.labels_BT[batch.sample_BT == number]))
    return AnswerIndex.build(samples.values())


class RandomReference:
    """Random losses, the same in every process and every time."""

    def __init__(self, index: AnswerIndex, seed: int = 3) -> None:
        self.index = index
        generator = torch.Generator().manual_seed(seed)
        self._values_N = 3 * torch.rand(index.num_tokens, generator=generator)

    def read(self, keys: Sequence[SampleKey]) -> Tensor:
        return self._values_N[self.index.locate(keys)]


def read_difficulty(store: Statistics, keys: Sequence[SampleKey]) -> Tensor:
    """The one column that the paper's score needs."""
    return store.read(keys)["difficulty"]


def write_difficulty(store: Statistics, keys: Sequence[SampleKey], values_N: Tensor) -> None:
    store.write(keys, {"difficulty": values_N})
