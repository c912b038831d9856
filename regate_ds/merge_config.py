"""Whether a run begins with steps on patches of tokens (see `algorithm/executions/merge.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from regate_ds.algorithm.knobs import Rule, refuse_knobs


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merged steps, at the start of a run, in which neighbouring tokens are one."""

    size: int = 4
    """Tokens of a patch."""

    steps: float = 0.0
    """Merged steps at the start: a count, or a share of the run below 1. 0 merges nothing. The rest
    of the run has the schedule of a run of its own."""

    def __post_init__(self) -> None:
        refuse_knobs(self, self._rules)

    def _rules(self) -> list[Rule]:
        is_whole = self.steps < 1 or float(self.steps).is_integer()
        return [
            ("size", self.size >= 2, "must be at least 2; to merge nothing set merge.steps=0"),
            ("steps", self.steps >= 0.0, "must be 0 or more"),
            ("steps", is_whole, "must be a whole number of steps, or a share below 1"),
        ]

    def in_steps(self, total_steps: int) -> int:
        """Return the merged steps of a run of so many optimizer steps."""
        steps = round(self.steps * total_steps) if self.steps < 1 else int(self.steps)
        return min(steps, total_steps)
