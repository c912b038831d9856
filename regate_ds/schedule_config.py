"""Which steps of a run are dense, as a configuration says it."""

from __future__ import annotations

from dataclasses import dataclass

from regate_ds.algorithm.knobs import Rule, refuse_knobs
from regate_ds.algorithm.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Which steps are dense; lengths in steps, or as shares of the run."""

    total_steps: int | None = None
    """Optimizer steps over which the schedule runs; null is the length of the run."""

    warmup: float = 0.05
    """Dense steps at the start: a count, or a share of the run below 1."""

    cycle_steps: int = 0
    """Length of a cycle after the warm-up, in steps; 0 means no cycles."""

    cycle_dense_steps: int = 0
    """Dense steps at the start of each cycle."""

    final_dense_share: float = 0.12
    """Share of the run at its end that is dense."""

    def __post_init__(self) -> None:
        refuse_knobs(self, self._rules)

    def _rules(self) -> list[Rule]:
        total, cycle = self.total_steps, self.cycle_steps
        whole_warmup = self.warmup < 1 or float(self.warmup).is_integer()
        return [
            ("total_steps", total is None or total >= 1, "must be at least 1, or null"),
            ("warmup", self.warmup >= 0.0, "must be 0 or more"),
            ("warmup", whole_warmup, "must be a whole number of steps, or a share below 1"),
            ("cycle_steps", cycle >= 0, "must be 0 or more"),
            (
                "cycle_dense_steps",
                0 <= self.cycle_dense_steps <= cycle,
                f"must be between 0 and cycle_steps={cycle}",
            ),
            ("final_dense_share", 0.0 <= self.final_dense_share <= 1.0, "must be in [0, 1]"),
        ]

    def in_steps(self, total_steps: int) -> Schedule:
        """Return the schedule of a run of so many optimizer steps."""
        total = total_steps if self.total_steps is None else self.total_steps
        warmup = round(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        return Schedule(
            total_steps=total,
            warmup_steps=warmup,
            cycle_steps=self.cycle_steps,
            cycle_dense_steps=self.cycle_dense_steps,
            final_dense_steps=round(self.final_dense_share * total),
        )
