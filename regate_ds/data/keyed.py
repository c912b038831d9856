"""Wrap the data set and the collate function of a user's own training loop.

``Keyed`` gives every item a key, and ``KeyedCollate`` reads the keys, labels and padding of a
micro-batch. Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regate_ds.algorithm.batch import SampleKey, TokenBatch, shift_labels
from regate_ds.data.collate import Batch
from regate_ds.data.joined import (
    BOUNDS,
    keys_of_rows,
    number_in_samples,
    read_segments,
    require_order,
    within_samples,
)
from regate_ds.data.padding import labels_of, padding_of

KEY = "regate_key"
"""Name of the key in an item."""

IMAGES = "regate_images"
"""Name of an input by which a collated batch may number its images itself: [B, T], -1 elsewhere."""

NumberImages = Callable[[Mapping[str, Any]], Tensor | None]
"""Returns the number of each position's image in its row, -1 where there is none, from what the
host's collate function returned; None if that does not tell. ValueError if it must."""

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


class Keyed(Dataset[dict[str, Any]]):
    """A map-style data set of dicts that adds to each item its key: (data set name, number)."""

    def __init__(self, dataset: Any, name: str) -> None:
        """Wrap ``dataset``; ``name`` is the data set's name in the keys, unique among data sets.

        ValueError if ``dataset`` has no length or no items by number, or ``name`` is no name.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"the data set's name is {name!r}; give a text, as Keyed(data, 'mine')"
            )
        if isinstance(dataset, Mapping) and 0 not in dataset:
            names = ", ".join(map(str, dataset))
            raise ValueError(
                f"{type(dataset).__name__} has items by name ({names}); give the data set of one "
                "split"
            )
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise ValueError(
                f"{type(dataset).__name__} has no length or no items by number; elision needs "
                "samples that can be named: use a map-style data set"
            )
        self._dataset: Any = dataset
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        """Pass on the data set's own attributes, which samplers and loaders may ask for."""
        if name in ("_dataset", "_name"):
            # Asked for before they are set, when a copy is made for a worker process.
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not isinstance(number, SupportsIndex):
            raise ValueError(f"there is no item {number!r}: items are read by their number, each")
        return self._keyed(number, self._dataset[number])

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Return several items, which a loader asks for at once; so does the data set, if it can.

        Without this method a loader would find the data set's own, whose items have no key.
        """
        read = getattr(self._dataset, "__getitems__", None)
        items = [self._dataset[number] for number in numbers] if read is None else read(numbers)
        return [self._keyed(number, item) for number, item in zip(numbers, items, strict=True)]

    def _keyed(self, number: int, item: Any) -> dict[str, Any]:
        if not isinstance(item, Mapping):
            raise ValueError(
                f"item {number} is a {type(item).__name__}; elision adds a key to each item: make "
                "the data set return dicts"
            )
        # A sample has one key, though -1 is the last one as well.
        number = index(number)
        return {**item, KEY: (self._name, number if number >= 0 else len(self) + number)}


class KeyedCollate:
    """A collate function that also reads what the method needs to know of a micro-batch.

    It takes the keys off the items, calls the host's collate function on the rest, and reads the
    ``labels`` and the ``attention_mask``. The labels are not among the inputs of the batch that it
    returns, because the plan has them; nor is ``regate_images``.

    The collate function may join several items into a row, in their order, and an item may hold
    several samples, whose keys are then a list. Where they begin is read off ``position_ids`` that
    begin again ([4, B, T], the text's first, for models with several axes), ``cu_seq_lens_q`` or
    ``seq_idx``; the latter two are not among the inputs either.
    """

    def __init__(
        self,
        collate_fn: Callable[[list[Any]], dict[str, Tensor]],
        number_images: NumberImages | None = None,
    ) -> None:
        """Wrap the host's ``collate_fn``; its labels are as Hugging Face models take them.

        number_images: numbers the images of batches without ``regate_images``; None if there are no
            images.
        """
        self._collate_fn, self._number_images = collate_fn, number_images

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """Return the micro-batch of these items.

        The tensors that the host's collate function returns may lie on a device.

        ValueError if an item has no key, the batch no label tensor, or a row padding on the left,
        or if its samples, or its images where they must be, cannot be told apart.
        """
        keys = [_keys_of(item) for item in items]
        inputs = self._collate_fn([_without_key(item) for item in items])
        labels_BT = labels_of(inputs)
        is_token_BT = padding_of(inputs, labels_BT)
        segment_BT = read_segments(inputs, is_token_BT, labels_BT, sum(map(len, keys)))
        targets_BT, image_BT = shift_labels(labels_BT), self._images(inputs, labels_BT)
        require_order(items, inputs, segment_BT)
        if bool((segment_BT > 0).any()):
            targets_BT = within_samples(targets_BT, segment_BT)
            image_BT = None if image_BT is None else number_in_samples(image_BT, segment_BT)
        gone = ("labels", IMAGES, *BOUNDS)
        inputs = {k: v for k, v in inputs.items() if k not in gone}
        rows = keys_of_rows(keys, segment_BT)
        return Batch(inputs, TokenBatch(rows, segment_BT, targets_BT, image_BT))

    def _images(self, inputs: Mapping[str, Any], labels_BT: Tensor) -> Tensor | None:
        """Return the numbers that the batch has itself, or else those of ``number_images``."""
        image_BT = inputs.get(IMAGES)
        if image_BT is None:
            found_BT = None if self._number_images is None else self._number_images(inputs)
            return found_BT if found_BT is None else found_BT.cpu()
        found = type(image_BT).__name__
        if isinstance(image_BT, Tensor):
            if image_BT.shape == labels_BT.shape and image_BT.dtype in _INTEGERS:
                return image_BT.long().cpu()
            found = f"{image_BT.dtype} {tuple(image_BT.shape)}"
        raise ValueError(
            f"the collated batch has {IMAGES} {found}; give whole numbers of the labels' shape "
            f"{tuple(labels_BT.shape)}: the image's number in its sample, and -1 elsewhere"
        )


class PlainCollate:
    """A collate function for runs without elision: it only takes off what is ours."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, items: list[Any]) -> Any:
        batch = self._collate_fn([_without_key(item) for item in items])
        if isinstance(batch, Mapping) and IMAGES in batch:
            return {k: v for k, v in batch.items() if k != IMAGES}
        return batch


def _keys_of(item: Any) -> tuple[SampleKey, ...]:
    """Return the keys of an item's samples: of one, or of a list of them.

    ValueError if it has none, or one that no store can hold.
    """
    if not isinstance(item, Mapping) or KEY not in item:
        raise ValueError(
            f"an item has no {KEY!r}; wrap the data set in Keyed(dataset, name), or make a "
            "stream's items dicts with a key by stream_key, one sample each"
        )
    given = item[KEY]
    if isinstance(given, list) and given and all(isinstance(one, list | tuple) for one in given):
        return tuple(_key_of(one) for one in given)
    return (_key_of(given),)


def _key_of(given: Any) -> SampleKey:
    match given:
        case [str(name), SupportsIndex() as number] if -(2**63) <= index(number) < 2**63:
            return name, index(number)
        case _:
            raise ValueError(
                f"an item's {KEY!r} is {given!r}; make it the data set's name and a whole number "
                "of 64 bits, as stream_key does, for one sample"
            )


def _without_key(item: Any) -> Any:
    return {k: v for k, v in item.items() if k != KEY} if isinstance(item, Mapping) else item
