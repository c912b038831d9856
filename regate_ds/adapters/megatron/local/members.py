"""In a merged step: of which positions a rank's slots are the mean, and what each of them predicts.

Shapes: N slots of this rank, M positions of a slot at most, P targets with padding, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from regate_ds.parallel.resharding import Route, move_rows


@dataclass(frozen=True)
class Members:
    """What the slots of this rank are made of, and the head's row that predicts each target."""

    share_NM: Tensor
    """fp32: the share of each position in its slot's mean; 0 where a slot has fewer than M."""

    row_P: Tensor
    """int64: the row of the head for each target of this context rank, with padding."""

    num_head_rows: int
    """Number of these rows: the slots that predict something here, with padding."""

    def to(self, device: torch.device | str) -> Members:
        return Members(self.share_NM.to(device), self.row_P.to(device), self.num_head_rows)

    def merged(
        self, full: Tensor, route: Route, shape: tuple[int, int], group: ProcessGroup | None
    ) -> Tensor:
        """Return the means over the positions of this rank's slots, [*shape, H].

        full: this rank's part of the positions [S, B, H]. route: that of each position to its place
        among those of its slot. All ranks of the group must call it.
        """
        num_slots, size = self.share_NM.shape
        rows = move_rows(full, route, (num_slots * size, 1), group)
        rows_NMH = rows.view(num_slots, size, -1)
        mean_NH = torch.bmm(self.share_NM.to(rows.dtype)[:, None], rows_NMH)
        return mean_NH.view(*shape, -1)
