"""Where a rank stands among those that share a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.parallel.resharding import SequenceCut


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a rank must know of its place to read a plan."""

    context_size: int = 1
    context_rank: int = 0
    sequence_size: int = 1
    """Tensor-parallel size under sequence parallelism, else 1."""

    sequence_rank: int = 0
    ragged: bool = False
    """Kept rows of a micro-batch lie behind one another (thd), not in rows of one length (sbhd)."""

    ends_early: bool = False
    """The gated range ends before the last layer: full sequences leave the decoder."""

    row_multiple: int = 1
    """What the kept rows of each rank must be a multiple of: 16 for most kinds of fp8."""

    @property
    def cut(self) -> SequenceCut:
        return SequenceCut(self.context_size, self.sequence_size)

    @property
    def multiple(self) -> int:
        """What a length of kept rows must be a multiple of, before it is cut."""
        return math.lcm(self.cut.multiple, self.row_multiple * self.cut.size)

    @property
    def rank(self) -> int:
        return self.context_rank * self.sequence_size + self.sequence_rank


def require_cut(window: Sequence[TokenBatch], place: Place) -> None:
    """Refuse rows that cannot be cut over the ranks, or whose samples would be mixed."""
    for batch in window:
        place.cut.owners(batch.labels_BT.shape[1])
        if all(len(row) <= 1 for row in batch.keys):
            continue
        if not place.ragged:
            raise ValueError(
                "a row holds several samples, which padded rows cannot keep apart; attach with "
                "row_format='ragged', or give one sample a row"
            )
        if place.context_size > 1:
            raise ValueError(
                "a row holds several samples, which is not supported with context parallelism; "
                "give one sample a row"
            )
