"""What a run hands to loggers beside its counts: shares of tokens, and time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_KINDS = {"": "tokens", "answer_": "answer", "image_": "image"}
"""Prefix of a share's name, and the kind of token whose counts it is made of."""


class Figures:
    """Shares and seconds of a run's steps.

    kept_share, answer_kept_share, image_kept_share: what was kept of all positions, of label
        positions and of those of images; a kind that a step has none of is left out.
    step_seconds: from the planning of the step to its end, on this rank.
    loss_merged, loss_single: at the first step behind the merged ones, the mean losses on both
        sides, on this rank.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        """Of the step that ended last; empty before the first end."""
        self._begun: float | None = None

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def end(
        self, metrics: Mapping[str, Any], more: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """metrics: the step's counts. more: what else is told of it."""
        self.last = {**shares_of(metrics), **more}
        if self._begun is not None:
            self.last["step_seconds"] = time.perf_counter() - self._begun
            self._begun = None


def shares_of(counts: Mapping[str, Any]) -> dict[str, float]:
    """Return what was kept of each kind of token that there is."""
    return {
        f"{prefix}kept_share": counts[f"{kind}_kept"] / counts[f"{kind}_total"]
        for prefix, kind in _KINDS.items()
        if counts[f"{kind}_total"]
    }
