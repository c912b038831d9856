"""The hardest of the whole step: one share over all samples of all data ranks.

On the step's own losses the chosen value is the value at risk at alpha = 1 - p, and the mean of
what is chosen the conditional one (arXiv 2505.19893).
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.quotas.quota import (
    Exchange,
    QuotaState,
    Samples,
    bits,
    key_rows,
    numbers,
    order_by,
    share_of,
)


@dataclass(frozen=True, kw_only=True)
class PerWindow:
    """k = ceil(p * n - 1e-9) of the n positions of the step, wherever they lie."""

    floor: float = 0.0
    """Share of each sample that is kept in any case; if that is more than k, more is kept."""

    def __post_init__(self) -> None:
        refuse_knobs(self, lambda: [("floor", 0.0 <= self.floor <= 1.0, "must be in [0, 1]")])

    def count(
        self,
        values_N: Tensor,
        samples: Samples,
        *,
        keep_share: float,
        exchange: Exchange,
        state: QuotaState,
    ) -> tuple[Tensor, QuotaState]:
        own_N4 = torch.cat([bits(values_N)[:, None], key_rows(samples)], 1)
        all_M4, start = exchange(own_N4)
        chosen_M = self._choose(all_M4, keep_share)
        chosen_N = chosen_M[start : start + len(own_N4)]
        sample_N = torch.arange(len(samples.keys)).repeat_interleave(samples.num_S)
        return torch.bincount(sample_N[chosen_N], minlength=len(samples.keys)), state

    def _choose(self, rows_M4: Tensor, keep_share: float) -> Tensor:
        """Mark what is kept of all data ranks' positions."""
        values_M = numbers(rows_M4[:, 0])
        # Rows come sample by sample; a sample that comes twice is two.
        sample_M = (rows_M4[:, 3] == 0).cumsum(0) - 1
        order_M = order_by([-values_M, *rows_M4[:, 1:].unbind(1)])
        is_floor_M = self._is_floor(sample_M[order_M])
        num_left = int(share_of(torch.tensor(len(rows_M4)), keep_share)) - int(is_floor_M.sum())
        is_next_M = (~is_floor_M).cumsum(0) <= num_left
        chosen_M = torch.zeros(len(rows_M4), dtype=torch.bool)
        chosen_M[order_M] = is_floor_M | is_next_M
        return chosen_M

    def _is_floor(self, sample_M: Tensor) -> Tensor:
        """Mark the first of each sample, in the order given, that its floor asks for."""
        sizes_S = torch.bincount(sample_M)
        floor_S = share_of(sizes_S, self.floor)
        by_sample_M = sample_M.argsort(stable=True)
        start_S = sizes_S.cumsum(0) - sizes_S
        rank_M = torch.empty_like(sample_M)
        rank_M[by_sample_M] = torch.arange(len(sample_M)) - start_S.repeat_interleave(sizes_S)
        return rank_M < floor_S[sample_M]
