"""Cut samples into the teacher's batches and the store's shards.

Both depend on the data and the token limit alone. Shapes: R rows of the answer index.
"""

from __future__ import annotations

from torch import Tensor

from regate_ds.stores.shares import into_shards

RowBatch = list[int]
"""Rows of the answer index that the teacher reads in one forward pass."""


def by_length(rows_R: Tensor, num_positions: Tensor) -> Tensor:
    """Sort rows from long to short, so that a batch too large for the device fails at once."""
    return rows_R[num_positions[rows_R].argsort(descending=True, stable=True)]


def cut_places(
    rows_R: Tensor, num_positions: Tensor, tokens_per_batch: int
) -> list[tuple[int, int]]:
    """Cut rows, sorted from long to short, into batches of at most ``tokens_per_batch`` padded
    tokens; return the places [start, end) of each. A longer row is a batch of its own."""
    lengths_R, places = num_positions[rows_R], [(0, 0)]
    while (start := places[-1][1]) < len(rows_R):
        # A batch is as wide as its first row.
        size = max(1, tokens_per_batch // max(1, int(lengths_R[start])))
        places.append((start, min(start + size, len(rows_R))))
    return places[1:]


def cut_batches(rows_R: Tensor, num_positions: Tensor, tokens_per_batch: int) -> list[RowBatch]:
    """Return the rows of each batch, of rows sorted from long to short."""
    places = cut_places(rows_R, num_positions, tokens_per_batch)
    return [rows_R[start:end].tolist() for start, end in places]


def cut_shards(rows_R: Tensor, num_positions: Tensor, tokens_per_batch: int) -> list[Tensor]:
    """Cut rows, int64 [R], into shards of whole batches. ``cut_batches`` of a shard's rows returns
    the same batches."""
    sorted_R = by_length(rows_R, num_positions)
    shards = into_shards(cut_places(sorted_R, num_positions, tokens_per_batch))
    return [sorted_R[part[0][0] : part[-1][1]] for part in shards]


def padded_tokens(batches: list[RowBatch], num_positions: Tensor) -> int:
    """Count the tokens of a forward pass over each of the batches, padding included."""
    return sum(len(batch) * int(num_positions[batch].max()) for batch in batches)
