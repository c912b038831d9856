"""Which steps are dense: a warm-up, the start of each cycle, and a block at the end of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The dense and sparse steps of a run. Lengths are in optimizer steps; steps count from 0."""

    total_steps: int
    warmup_steps: int
    cycle_steps: int
    cycle_dense_steps: int
    final_dense_steps: int

    def is_dense(self, step: int) -> bool:
        """Return whether the step keeps every token: it is in the warm-up, the end block or the
        dense start of a cycle."""
        if step < self.warmup_steps or step >= self.total_steps - self.final_dense_steps:
            return True
        if self.cycle_steps == 0:
            return False
        return (step - self.warmup_steps) % self.cycle_steps < self.cycle_dense_steps

    def num_sparse(self, num_steps: int) -> int:
        """Return how many of the first ``num_steps`` steps are sparse."""
        return sum(not self.is_dense(step) for step in range(num_steps))

    def expected_share(self, keep_share: float, num_steps: int | None = None) -> float:
        """Return the mean over steps of the share kept: 1 if dense, else ``keep_share``.

        num_steps: how many steps, from the first; None is all of the schedule.
        """
        num_steps = self.total_steps if num_steps is None else num_steps
        return 1.0 - self.num_sparse(num_steps) * (1.0 - keep_share) / num_steps

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Refuse, by ValueError, to go on with another schedule than the saved one."""
        for name, value in asdict(self).items():
            if saved[name] != value:
                raise ValueError(
                    f"{name} is {value} by this configuration, but {saved[name]} in the "
                    "checkpoint's run; resume with the same schedule"
                )


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """When answers and when images are elided; None is never."""

    answers: Schedule | None
    images: Schedule | None

    def chooses_answers(self, step: int) -> bool:
        return self.answers is not None and not self.answers.is_dense(step)

    def chooses_images(self, step: int) -> bool:
        return self.images is not None and not self.images.is_dense(step)

    def is_dense(self, step: int) -> bool:
        """Return whether the step keeps every token."""
        return not (self.chooses_answers(step) or self.chooses_images(step))

    def num_sparse(self, num_steps: int) -> int:
        """Return in how many of the first ``num_steps`` steps something is elided."""
        return sum(not self.is_dense(step) for step in range(num_steps))
