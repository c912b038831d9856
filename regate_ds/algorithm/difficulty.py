"""What is remembered of a label position: a moving average of the student's own loss, or another
statistic of the positions that ran."""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.scores.score import Statistic


def update_difficulty(old_N: Tensor, fresh_N: Tensor, *, decay: float) -> Tensor:
    """Blend fresh values in: m <- decay * m + (1 - decay) * value, without bias correction.

    Give only positions whose loss entered the gradient; all others keep their value. fp32. A
    position that was never seen, at infinity, begins with its first value.
    """
    fresh_N = fresh_N.to(old_N.dtype)
    return torch.where(old_N.isinf(), fresh_N, torch.lerp(fresh_N, old_N, decay))


def updated_statistics(
    statistics: Sequence[Statistic],
    window: Sequence[TokenBatch],
    micro: Sequence[ElisionPlan],
    old: Mapping[str, Tensor],
    recorded: Mapping[int, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Return each statistic at all label positions [N] of a window after a step.

    recorded: what each micro-batch's targets gave, by name. RuntimeError for a value that is not
    finite, ValueError if the values were not recorded.
    """
    values = [recorded[plan.micro] for plan in micro]
    return {one.name: _updated(one, window, micro, old[one.name], values) for one in statistics}


def _updated(
    statistic: Statistic,
    window: Sequence[TokenBatch],
    micro: Sequence[ElisionPlan],
    old_N: Tensor,
    recorded: Sequence[Mapping[str, Tensor]],
) -> Tensor:
    olds = old_N.split([batch.num_labels for batch in window])
    parts = []
    for batch, plan, old_n, values in zip(window, micro, olds, recorded, strict=True):
        if statistic.of not in values:
            raise ValueError(
                f"the score's statistic {statistic.name!r} is made of {statistic.of!r}, but "
                f"{sorted(values)} were recorded; give it to `record`"
            )
        number_P = batch.is_label_BT.reshape(-1).long().cumsum(0) - 1
        seen_L = number_P[plan.label_position_L]
        fresh_L = values[statistic.of].to("cpu", torch.float32)
        require_finite(batch, plan, fresh_L, statistic.of)
        fresh_L = update_difficulty(old_n[seen_L], fresh_L, decay=statistic.decay)
        parts.append(old_n.index_copy(0, seen_L, fresh_L))
    return torch.cat(parts)


def require_finite(batch: TokenBatch, plan: ElisionPlan, values_L: Tensor, name: str) -> None:
    """Refuse, by RuntimeError naming the sample, a value that is not finite."""
    bad_L = (~values_L.isfinite()).nonzero().squeeze(1)
    if len(bad_L) == 0:
        return
    where = int(plan.label_position_L[bad_L[0]])
    dataset, number = batch.flat_keys[int(batch.sample_BT.reshape(-1)[where])]
    row, position = divmod(where, plan.num_tokens)
    raise RuntimeError(
        f"step {plan.step}: the {name} of sample {dataset!r} record {number} at position "
        f"{position} of row {row} is {float(values_L[bad_L[0]])}; the run has diverged: resume "
        "from an earlier checkpoint with a lower learning rate"
    )
