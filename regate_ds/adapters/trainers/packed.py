"""Rows of several samples, as TRL packs them: a sample is what it has put into a row as one piece.

Its key is the data set's name and its number among all pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from regate_ds.data.keyed import KEY, Keyed

LENGTHS = "seq_lengths"
"""Column of a packed data set: the lengths of each row's samples."""


class PackedRows(Keyed):
    """The rows of a prepared data set, each with the keys of its samples."""

    def __init__(self, dataset: Any, name: str) -> None:
        """Wrap a data set whose rows have ``input_ids`` and, where they are packed, their samples'
        lengths."""
        super().__init__(dataset, name)
        counts = [1] * len(dataset)
        if LENGTHS in dataset.column_names:
            counts = [len(lengths) for lengths in dataset[LENGTHS]]
        self._first = np.concatenate([[0], np.cumsum(counts)])

    def _keyed(self, number: int, item: Any) -> dict[str, Any]:
        first, end = self._first[number : number + 2]
        return {**item, KEY: [(self._name, one) for one in range(int(first), int(end))]}

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
