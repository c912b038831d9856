"""Give the micro-batches of one optimizer step the one shape that a pipeline needs.

Packed samples lie behind one another in one row, as attention by bounds (thd) wants them, each
filled up to what context ranks can cut. Padding at the end of the row counts as one more sample, so
that no position is without one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from regate_ds.adapters.window import in_steps
from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.data.collate import Batch
from regate_ds.parallel.resharding import SequenceCut


def windows(
    loader: Iterable[Batch], size: int, *, pad_id: int, cut: SequenceCut, packs: bool = False
) -> Iterator[list[Batch]]:
    """Yield groups of ``size`` micro-batches, padded to one length that ``cut`` divides, by group.

    With ``packs`` each is one row of all its samples, and its inputs have ``lengths``: a tuple of
    those of the samples.
    """
    for micro in in_steps(loader, size, keep_rest=False):
        rows = [to_one_row(batch, pad_id, cut.zigzag) for batch in micro] if packs else micro
        even = to_one_length(rows, pad_id=pad_id, multiple=cut.multiple)
        yield [_with_lengths(batch, cut.zigzag) for batch in even] if packs else even


def to_one_row(batch: Batch, pad_id: int, multiple: int) -> Batch:
    """Put all samples of a micro-batch behind one another, each filled up to a multiple."""
    tokens = batch.tokens
    counts = [int((tokens.sample_BT == n).sum()) for n in range(len(tokens.flat_keys))]
    ends = accumulate(math.ceil(count / multiple) * multiple for count in counts)
    starts = [0, *ends]
    where_N = torch.cat([start + torch.arange(n) for start, n in zip(starts, counts, strict=False)])
    is_real_BT = tokens.segment_BT >= 0

    def row(x_BT: Tensor, value: int) -> Tensor:
        return x_BT.new_full((1, starts[-1]), value).index_copy(1, where_N, x_BT[is_real_BT][None])

    inputs = {name: x for name, x in batch.inputs.items() if name != "position_ids"}
    image_BT = tokens.image_BT
    return Batch(
        {**inputs, "input_ids": row(inputs["input_ids"], pad_id)},
        TokenBatch(
            keys=(tuple(tokens.flat_keys),),
            segment_BT=row(tokens.sample_BT, -1),
            labels_BT=row(tokens.labels_BT, IGNORE),
            image_BT=None if image_BT is None else row(image_BT, -1),
        ),
    )


def _with_lengths(batch: Batch, multiple: int) -> Batch:
    """Tell the model how long the samples of a micro-batch of one row are, with what fills them."""
    (segment_T,) = batch.tokens.segment_BT
    counts_S = torch.bincount(segment_T[segment_T >= 0])
    lengths = [math.ceil(count / multiple) * multiple for count in counts_S.tolist()]
    rest = len(segment_T) - sum(lengths)
    told = (*lengths, rest) if rest else tuple(lengths)
    return Batch({**batch.inputs, "lengths": told}, batch.tokens)


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
