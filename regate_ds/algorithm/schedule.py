"""Which steps are dense: a warm-up, the head of each cycle, and a block at the end of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All lengths in optimizer steps, counted from 0."""

    total_steps: int
    warmup_steps: int
    cycle_steps: int
    cycle_dense_steps: int
    final_dense_steps: int

    def is_dense(self, step: int) -> bool:
        """step < W, or step >= T - final, or C > 0 and (step - W) mod C < F."""
        if step < self.warmup_steps or step >= self.total_steps - self.final_dense_steps:
            return True
        if self.cycle_steps == 0:
            return False
        return (step - self.warmup_steps) % self.cycle_steps < self.cycle_dense_steps

    def expected_share(self, keep_share: float) -> float:
        """Share of label positions processed over the run: the mean of 1 (dense) or keep_share."""
        num_dense = sum(self.is_dense(step) for step in range(self.total_steps))
        return (num_dense + (self.total_steps - num_dense) * keep_share) / self.total_steps

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Refuse, by ValueError, to go on with another schedule than the saved one."""
        for name, value in asdict(self).items():
            if saved[name] != value:
                raise ValueError(
                    f"{name} is {value} by this configuration, but {saved[name]} in the "
                    "checkpoint's run; resume with the same schedule"
                )
