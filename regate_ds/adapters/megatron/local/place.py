"""A rank's place among the ranks that share a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.rows import RowLayout
from regate_ds.parallel.resharding import SequenceCut


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a rank must know about its place to find its share of a plan."""

    context_size: int = 1
    context_rank: int = 0
    sequence_size: int = 1
    """Tensor-parallel size under sequence parallelism, else 1."""

    sequence_rank: int = 0
    ragged: bool = False
    """Whether the row format is ragged: kept rows of a micro-batch lie one after the other."""

    ends_early: bool = False
    """Whether the gated range ends before the last layer, so full sequences leave the decoder."""

    token_multiple: int = 1
    """What the user wants the number of kept rows to be a multiple of."""

    row_multiple: int = 1
    """What the number of kept rows of each rank must be a multiple of: 16 for most kinds of fp8."""

    @property
    def cut(self) -> SequenceCut:
        """Return how a sequence is divided over the ranks that share it."""
        return SequenceCut(self.context_size, self.sequence_size)

    @property
    def rows(self) -> RowLayout:
        """Return how kept rows must lie, so that the ranks can divide them."""
        row_format = "ragged" if self.ragged else "padded"
        return self.cut.row_layout(row_format, self.token_multiple, self.row_multiple)

    @property
    def rank(self) -> int:
        """Return this rank's number among the ranks that share a sequence."""
        return self.context_rank * self.sequence_size + self.sequence_rank


def require_cut(window: Sequence[TokenBatch], place: Place) -> None:
    """Refuse rows that the ranks cannot divide, or whose samples would be mixed: ValueError."""
    for batch in window:
        place.cut.owners(batch.labels_BT.shape[1])
        num_samples = max((len(row) for row in batch.keys), default=0)
        if num_samples <= 1:
            continue
        if not place.ragged:
            raise ValueError(
                f"a row holds {num_samples} samples, which padded rows cannot keep apart; attach "
                "with row_format='ragged', or give one sample a row"
            )
        if place.context_size > 1:
            raise ValueError(
                f"a row holds {num_samples} samples, which is not supported with context "
                f"parallelism (size {place.context_size}); give one sample a row"
            )
