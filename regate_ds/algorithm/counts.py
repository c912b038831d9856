"""Count the tokens of a step: all of them, and those that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from regate_ds.algorithm.batch import IMAGE, TokenBatch
from regate_ds.algorithm.plan import ElisionPlan

COUNTS = (
    "tokens_total",
    "tokens_kept",
    "answer_total",
    "answer_kept",
    "answer_entered",
    "image_total",
    "image_kept",
    "filled",
    "padded",
)
"""Names of a step's counts. "answer" counts label positions, "image" the other positions of images
but the first of a sample (0 where a batch does not tell them), "tokens" all but padding. "kept"
counts what enters gated layers, of the answer what has a loss; "answer_entered" is what enters."""


def count_step(
    window: Sequence[TokenBatch],
    micro: Sequence[ElisionPlan],
    padding: Callable[[ElisionPlan], int],
) -> list[int]:
    """Return the counts of one rank's micro-batches, in the order of COUNTS.

    padding: returns the number of padding slots of a plan.
    """
    pairs = list(zip(window, micro, strict=True))
    return [
        sum(int((batch.segment_BT >= 0).sum()) for batch in window),
        sum(plan.num_kept for plan in micro),
        sum(batch.num_labels for batch in window),
        sum(plan.num_targets for plan in micro),
        sum(_entering(one.is_label_BT, plan) for one, plan in pairs),
        sum(int((batch.kind_BT == IMAGE).sum()) for batch in window),
        sum(_entering(one.kind_BT == IMAGE, plan) for one, plan in pairs),
        sum(plan.num_filled for plan in micro),
        sum(map(padding, micro)),
    ]


def _entering(among_BT: Tensor, plan: ElisionPlan) -> int:
    """Return how many of the marked positions enter a gated layer, rounded where layers differ."""
    sets = plan.sets or (plan,)
    return round(sum(int(among_BT.reshape(-1)[one.position_R].sum()) for one in sets) / len(sets))
