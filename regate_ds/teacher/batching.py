"""Cut samples into the teacher's batches and the store's shards.

Both depend on the data and the token limit alone. Shapes: R rows of the answer index.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from regate_ds.stores.shares import into_shards

RowBatch = list[int]
"""Rows of the answer index that the teacher reads in one forward pass."""


def by_length(rows_R: Tensor, num_positions: Tensor) -> list[int]:
    """Sort rows from long to short, so that a batch too large for the device fails at once."""
    return rows_R[num_positions[rows_R].argsort(descending=True, stable=True)].tolist()


def cut_batches(
    rows: Sequence[int], num_positions: Tensor, tokens_per_batch: int
) -> list[RowBatch]:
    """Cut rows, sorted from long to short, into batches of at most ``tokens_per_batch`` padded
    tokens. A longer row is a batch of its own."""
    lengths = num_positions[rows].tolist()
    batches: list[RowBatch] = []
    widest = 0
    for row, length in zip(rows, lengths):
        # A batch is as wide as its first row.
        if batches and (len(batches[-1]) + 1) * widest <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
            widest = length
    return batches


def cut_shards(rows_R: Tensor, num_positions: Tensor, tokens_per_batch: int) -> list[list[int]]:
    """Cut rows, int64 [R], into shards of whole batches. ``cut_batches`` of a shard's rows returns
    the same batches."""
    batches = cut_batches(by_length(rows_R, num_positions), num_positions, tokens_per_batch)
    return [[row for batch in part for row in batch] for part in into_shards(batches)]


def padded_tokens(batches: list[RowBatch], num_positions: Tensor) -> int:
    """Count the tokens of a forward pass over each of the batches, padding included."""
    return sum(len(batch) * int(num_positions[batch].max()) for batch in batches)
