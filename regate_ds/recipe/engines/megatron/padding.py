"""Pad the micro-batches of one optimizer step to the one length that a pipeline needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch.nn.functional import pad

from regate_ds.adapters.window import in_steps
from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.collate import Batch


def windows(
    loader: Iterable[Batch], size: int, *, pad_id: int, multiple: int
) -> Iterator[list[Batch]]:
    """Yield groups of ``size`` micro-batches, padded to one length in each group.

    The length is a multiple of ``multiple``.
    """
    for micro in in_steps(loader, size, keep_rest=False):
        yield to_one_length(micro, pad_id=pad_id, multiple=multiple)


def to_one_length(micro: Sequence[Batch], *, pad_id: int, multiple: int) -> list[Batch]:
    longest = max(batch.tokens.segment_BT.shape[1] for batch in micro)
    length = math.ceil(longest / multiple) * multiple
    return [_widen(batch, length, pad_id) for batch in micro]


def _widen(batch: Batch, length: int, pad_id: int) -> Batch:
    tokens = batch.tokens
    missing = (0, length - tokens.segment_BT.shape[1])
    image_BT = tokens.image_BT
    return Batch(
        {**batch.inputs, "input_ids": pad(batch.inputs["input_ids"], missing, value=pad_id)},
        replace(
            tokens,
            segment_BT=pad(tokens.segment_BT, missing, value=-1),
            labels_BT=pad(tokens.labels_BT, missing, value=IGNORE),
            image_BT=None if image_BT is None else pad(image_BT, missing, value=-1),
        ),
    )
