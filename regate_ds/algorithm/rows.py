"""How kept tokens lie in the rows of a micro-batch: one frozen value, which an adapter makes."""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from regate_ds.algorithm.plan import ElisionPlan, Slots, assemble_plan

RowFormat = Literal["padded", "ragged"]


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """What the lengths of kept rows must be, so that kernels and ranks can take them."""

    row_format: RowFormat = "padded"
    """``padded``: each row of the batch keeps its own, padded to the longest. ``ragged``: all kept
    tokens of a micro-batch lie behind one another."""

    multiple: int = 1
    """Length of a padded row, or of all ragged rows together, is a multiple of it."""

    sample_multiple: int = 1
    """Ragged rows: length of each sample, where context ranks cut every sample."""

    equal: bool = False
    """Padded rows of all micro-batches of a step have one length, for hosts whose shapes must not
    change within a step."""

    @property
    def fills_rows(self) -> bool:
        """Whether each row is filled up by itself; else the micro-batch is, by any of its rows."""
        return self.row_format == "padded" or self.sample_multiple > 1

    @property
    def fill_multiple(self) -> int:
        """What a row, or the micro-batch, is filled up to by the next-best label positions."""
        return self.multiple if self.row_format == "padded" else self._ragged_fill

    @property
    def _ragged_fill(self) -> int:
        return self.sample_multiple if self.sample_multiple > 1 else self.multiple

    @property
    def slot_multiple(self) -> int:
        """What the number of slots of a row of the plan is a multiple of."""
        return self.multiple if self.row_format == "padded" else 1

    def num_padding(self, plan: ElisionPlan) -> int:
        """Return how many rows of a micro-batch hold no token, as the host lays them out."""
        if self.row_format == "padded" or not plan.moves_rows:
            return plan.num_padded
        return sum(self.ragged_lengths(plan.sample_lengths)) - plan.num_kept

    def ragged_lengths(self, kept_S: Tensor) -> list[int]:
        """Return rows of each sample, padded to its multiple; last, the padding of the whole."""
        padded_S = (kept_S + self.sample_multiple - 1) // self.sample_multiple
        lengths: list[int] = (padded_S * self.sample_multiple).tolist()
        end = sum(lengths)
        missing = max(1, math.ceil(end / self.multiple)) * self.multiple - end
        return lengths + [missing] * (missing > 0)


def widen(plan: ElisionPlan, num_slots: int) -> ElisionPlan:
    """Return the same plan with rows of ``num_slots`` slots: padding at their ends."""
    missing = num_slots - plan.num_slots
    if not plan.moves_rows or missing == 0:
        return plan

    def wider(x_BK: Tensor, value: int) -> Tensor:
        return nn.functional.pad(x_BK, (0, missing), value=value)

    row_L, slot_L = plan.label_slot_L // plan.num_slots, plan.label_slot_L % plan.num_slots
    label_slot_L = row_L * num_slots + slot_L
    slots = Slots(wider(plan.kept_BK, 0), wider(plan.segment_BK, -1), label_slot_L, plan.targets_L)
    wide = assemble_plan(
        slots,
        num_tokens=plan.num_tokens,
        moves_rows=True,
        is_packed=plan.is_packed,
        token_run_lengths=plan.token_run_lengths,
    )
    same = {name: getattr(plan, name) for name in ("weight_L", "num_filled", "step", "micro")}
    return replace(wide, label_position_L=plan.label_position_L, **same)
