"""Count the tokens of a step: all of them, and those that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan

COUNTS = ("tokens_total", "tokens_kept", "answer_total", "answer_kept", "filled", "padded")
"""Names of a step's counts. "answer" counts label positions, "tokens" all but padding."""


def count_step(
    window: Sequence[TokenBatch],
    micro: Sequence[ElisionPlan],
    padding: Callable[[ElisionPlan], int],
) -> list[int]:
    """Return the counts of one rank's micro-batches, in the order of COUNTS.

    padding: returns the number of padding slots of a plan.
    """
    return [
        sum(int((batch.segment_BT >= 0).sum()) for batch in window),
        sum(plan.num_kept for plan in micro),
        sum(int(batch.is_label_BT.sum()) for batch in window),
        sum(plan.num_targets for plan in micro),
        sum(plan.num_filled for plan in micro),
        sum(map(padding, micro)),
    ]
