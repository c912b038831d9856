"""In a merged step: of which positions a rank's slots are the mean, and what each of them predicts.

Shapes: N slots of this rank, M positions of a slot at most, L targets of this context rank, H
hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from regate_ds.parallel.resharding import Route, move_rows


@dataclass(frozen=True)
class Members:
    """What the slots of this rank are made of, and where the head predicts each target."""

    share_NM: Tensor
    """fp32: the share of each position in its slot's mean; 0 where a slot has fewer than M."""

    cell_L: Tensor
    """int64: the place of each target of this context rank in [head rows * M]."""

    num_head_rows: int
    """Number of these rows: the slots that predict something here, with padding."""

    def to(self, device: torch.device | str) -> Members:
        return Members(self.share_NM.to(device), self.cell_L.to(device), self.num_head_rows)

    @property
    def size(self) -> int:
        """M."""
        return self.share_NM.shape[1]

    def merged(
        self, full: Tensor, route: Route, shape: tuple[int, int], group: ProcessGroup | None
    ) -> Tensor:
        """Return the means over the positions of this rank's slots, [*shape, H].

        full: this rank's part of the positions [S, B, H]. route: that of each position to its place
        among those of its slot. All ranks of the group must call it.
        """
        num_slots = len(self.share_NM)
        rows = move_rows(full, route, (num_slots * self.size, 1), group)
        rows_NMH = rows.view(num_slots, self.size, -1)
        mean_NH = torch.bmm(self.share_NM.to(rows.dtype)[:, None], rows_NMH)
        return mean_NH.view(*shape, -1)
