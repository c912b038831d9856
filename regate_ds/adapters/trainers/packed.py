"""Rows of several samples, as a trainer packs them: whose tokens are whose.

TRL joins the rows of a micro-batch into one and says where samples begin by their positions. Here a
sample is what it has put into a row as one piece: its key is the data set's name and its number
among all pieces. Shapes: T positions of the joined row, S positions of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from regate_ds.algorithm.batch import IGNORE, SampleKey, TokenBatch, shift_labels
from regate_ds.data.collate import Batch
from regate_ds.data.keyed import KEY, Keyed

LENGTHS = "seq_lengths"
"""Column of a packed data set: the lengths of each row's samples."""

_OF_SAMPLES = ("labels", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Inputs of a joined row that the plan has, or makes of what is kept."""

_NUMBER_OF_SAMPLE = "seq_idx"


class PackedRows(Keyed):
    """The rows of a prepared data set, each with the key of its first sample."""

    def __init__(self, dataset: Any, name: str) -> None:
        """Wrap a data set whose rows have ``input_ids`` and, where they are packed, their samples'
        lengths."""
        super().__init__(dataset, name)
        counts = [1] * len(dataset)
        if LENGTHS in dataset.column_names:
            counts = [len(lengths) for lengths in dataset[LENGTHS]]
        self._first = np.concatenate([[0], np.cumsum(counts)])

    def _keyed(self, number: int, item: Any) -> dict[str, Any]:
        return {**item, KEY: (self._name, int(self._first[number]))}

    @property
    def samples(self) -> Keyed:
        """The same samples, each by itself, as the teacher reads it."""
        return Keyed(_SamplesOfRows(self._dataset, self._first), self._name)


class _SamplesOfRows(Dataset[dict[str, Any]]):
    """Each sample of packed rows by itself."""

    def __init__(self, rows: Any, first: np.ndarray) -> None:
        self._rows, self._first = rows, first

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = int(np.searchsorted(self._first, number, side="right")) - 1
        item = self._rows[row]
        lengths, place = lengths_of(item), number - int(self._first[row])
        begin = sum(lengths[:place])
        part = slice(begin, begin + lengths[place])
        labels = item.get("labels", item["input_ids"])
        return {"input_ids": item["input_ids"][part], "labels": labels[part]}


def collate_alone(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate one of ``PackedRows.samples``, without its key."""
    (item,) = items
    return {name: torch.tensor([item[name]]) for name in ("input_ids", "labels")}


def lengths_of(item: dict[str, Any]) -> list[int]:
    """Return the lengths of the samples in a row."""
    return list(item[LENGTHS]) if LENGTHS in item else [len(item["input_ids"])]


class JoinedCollate:
    """A collate function around one that joins all rows into one."""

    def __init__(self, collate_fn: Callable[[list[Any]], dict[str, Any]]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, items: list[dict[str, Any]]) -> Batch:
        """Return the micro-batch of these items of ``PackedRows``.

        ValueError if the batch is not one row of their tokens.
        """
        lengths = [length for item in items for length in lengths_of(item)]
        bare = [{name: x for name, x in item.items() if name != KEY} for item in items]
        inputs = self._collate_fn(bare)
        labels_1T = inputs["labels"]
        if len(labels_1T) != 1 or labels_1T.shape[1] < sum(lengths):
            raise ValueError(
                f"the collate function made rows {tuple(labels_1T.shape)} of {len(lengths)} "
                f"samples with {sum(lengths)} tokens; rows of several samples must be joined into "
                "one, as TRL does with padding_free=True"
            )
        runs = torch.tensor([*lengths, labels_1T.shape[1] - sum(lengths)])
        segment_1T = torch.arange(len(runs)).repeat_interleave(runs)[None]
        segment_1T = segment_1T.masked_fill(segment_1T == len(lengths), -1)
        targets_1T = shift_labels(labels_1T).masked_fill(segment_1T < 0, IGNORE)
        tokens = TokenBatch((tuple(_keys(items)),), segment_1T, targets_1T)
        gone = {*_OF_SAMPLES, _NUMBER_OF_SAMPLE}
        return Batch({k: v for k, v in inputs.items() if k not in gone}, tokens)


def _keys(items: list[dict[str, Any]]) -> list[SampleKey]:
    return [
        (item[KEY][0], item[KEY][1] + place)
        for item in items
        for place in range(len(lengths_of(item)))
    ]
