"""All quotas, by the name that a configuration gives them."""

from __future__ import annotations

from regate_ds.algorithm.quotas.per_sample import PerSample
from regate_ds.algorithm.quotas.per_window import PerWindow
from regate_ds.algorithm.quotas.quota import Quota
from regate_ds.algorithm.quotas.threshold import Threshold

QUOTAS: dict[str, type[Quota]] = {
    "per_sample": PerSample,
    "per_window": PerWindow,
    "threshold": Threshold,
}
