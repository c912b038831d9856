"""Elided positions take part in the mixers, and not in the MLPs: for decoders with a recurrence.

The kept positions, and the targets of the loss, are those of ``elide``.
"""

from __future__ import annotations

from dataclasses import dataclass

from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.execution import Span


@dataclass(frozen=True, kw_only=True)
class MlpOnly(Elide):
    """Keep what ``elide`` keeps; in gated layers only the MLP branch leaves the others out."""

    def spans(self, first_layer: int, last_layer: int) -> tuple[Span, ...]:
        return (Span(first=first_layer, last=last_layer, part="mlp"),)
