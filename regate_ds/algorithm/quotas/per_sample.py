"""The paper's quota: the same share of every sample."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regate_ds.algorithm.quotas.quota import Exchange, QuotaState, Samples, share_of


@dataclass(frozen=True, kw_only=True)
class PerSample:
    """k = ceil(p * n - 1e-9) of each sample's n."""

    def count(
        self,
        values_N: Tensor,
        samples: Samples,
        *,
        keep_share: float,
        exchange: Exchange,
        state: QuotaState,
    ) -> tuple[Tensor, QuotaState]:
        return share_of(samples.num_S, keep_share), state
