"""For training loops of users' own: name the samples, and read a host's batch as tokens.

Shapes: B rows of one sample each, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regate_ds.algorithm.batch import TokenBatch, shift_labels
from regate_ds.data.collate import Batch

KEY = "regate_key"


class Keyed(Dataset[dict[str, Any]]):
    """A map-style data set of dicts whose items know their key: (data set name, record number)."""

    def __init__(self, dataset: Any, name: str) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"{type(dataset).__name__} has no length or no items by number; elision needs "
                "samples that can be named: use a map-style data set"
            )
        self._dataset: Any = dataset
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        item = self._dataset[number]
        if not isinstance(item, Mapping):
            raise ValueError(
                f"item {number} is a {type(item).__name__}; elision needs items that are dicts, to "
                "add a key to each"
            )
        return {**item, KEY: (self._name, number)}


class KeyedCollate:
    """Takes keys off the items, lets the host collate the rest, and reads labels and padding.

    The labels leave the batch, as the plan has them.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, items: list[dict[str, Any]]) -> Batch:
        if any(KEY not in item for item in items):
            raise ValueError(f"an item has no {KEY!r}; wrap the data set in Keyed(dataset, name)")
        keys = tuple((tuple(item[KEY]),) for item in items)
        inputs = self._collate_fn([_without_key(item) for item in items])
        labels_BT = inputs.get("labels")
        if not isinstance(labels_BT, Tensor):
            raise ValueError(
                f"the collated batch has labels {type(labels_BT).__name__}, not a tensor [rows, "
                "tokens]; elision follows them"
            )
        mask_BT = inputs.get("attention_mask", torch.ones_like(labels_BT)).bool()
        if bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()):
            raise ValueError("a row has padding before tokens; set padding_side='right'")
        segment_BT = torch.where(mask_BT, 0, -1)
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        return Batch(inputs, TokenBatch(keys, segment_BT, shift_labels(labels_BT)))


class PlainCollate:
    """Takes keys off the items and leaves all else to the host: for runs without elision."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, items: list[Any]) -> Any:
        return self._collate_fn([_without_key(item) for item in items])


def _without_key(item: Any) -> Any:
    return {k: v for k, v in item.items() if k != KEY} if isinstance(item, dict) else item
