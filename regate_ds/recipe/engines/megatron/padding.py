"""Give the micro-batches of one optimizer step the one shape that a pipeline needs.

Packed samples lie behind one another in one row, as attention by bounds (thd) wants them. Padding
at its end counts as one more sample, so that no position is without one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch.nn.functional import pad

from regate_ds.adapters.window import in_steps
from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.data.collate import Batch


def windows(
    loader: Iterable[Batch], size: int, *, pad_id: int, multiple: int, packs: bool = False
) -> Iterator[list[Batch]]:
    """Yield groups of ``size`` micro-batches, padded to one length in each group.

    The length is a multiple of ``multiple``. With ``packs`` each is one row of all its samples, and
    its inputs have ``bounds``: int32, where each sample starts, then the end of the last one.
    """
    for micro in in_steps(loader, size, keep_rest=False):
        rows = [to_one_row(batch) for batch in micro] if packs else micro
        even = to_one_length(rows, pad_id=pad_id, multiple=multiple)
        yield [with_bounds(batch) for batch in even] if packs else even


def to_one_row(batch: Batch) -> Batch:
    """Put all samples of a micro-batch behind one another, without padding."""
    tokens, is_real_BT = batch.tokens, batch.tokens.segment_BT >= 0
    image_BT = tokens.image_BT
    inputs = {name: x for name, x in batch.inputs.items() if name != "position_ids"}
    return Batch(
        {**inputs, "input_ids": inputs["input_ids"][is_real_BT][None]},
        TokenBatch(
            keys=(tuple(tokens.flat_keys),),
            segment_BT=tokens.sample_BT[is_real_BT][None],
            labels_BT=tokens.labels_BT[is_real_BT][None],
            image_BT=None if image_BT is None else image_BT[is_real_BT][None],
        ),
    )


def with_bounds(batch: Batch) -> Batch:
    """Tell the model where the samples of a micro-batch of one row lie."""
    (segment_T,) = batch.tokens.segment_BT
    lengths = segment_T.unique_consecutive(return_counts=True)[1]
    return Batch({**batch.inputs, "bounds": pad(lengths.cumsum(0), (1, 0)).int()}, batch.tokens)


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
