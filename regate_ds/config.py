"""The method's configuration; docs/algorithm.md has the formulas, arXiv 2507.21420 is the paper.

The short form is here; what a score, a quota or an execution alone needs stands beside it, in
`algorithm/`, and in a file under the name of the method:

    elision: {keep_share: 0.5, score: fused, fused: {reference_weight: 0.5}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.execution import Execution
from regate_ds.algorithm.executions.table import EXECUTIONS
from regate_ds.algorithm.knobs import Rule, refuse_knobs
from regate_ds.algorithm.quotas.per_sample import PerSample
from regate_ds.algorithm.quotas.quota import Quota
from regate_ds.algorithm.quotas.table import QUOTAS
from regate_ds.algorithm.schedule import Schedule
from regate_ds.algorithm.scores.fused import Fused
from regate_ds.algorithm.scores.score import Score, Statistic
from regate_ds.algorithm.scores.table import SCORES
from regate_ds.algorithm.window import Method
from regate_ds.settings.former_keys import moved_keys


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


@dataclass(frozen=True, kw_only=True)
class RegateConfig:
    """What is kept, when, and where in the decoder. Frozen; impossible values fail at birth."""

    enabled: bool = True
    """False: no hook is installed and the run is the host's own, bit for bit."""

    execution: Execution = field(default_factory=Elide)
    """What becomes of unchosen label positions in a sparse step; `none` makes every step dense (the
    baseline that elision is measured against)."""

    score: Score = field(default_factory=Fused)
    """What ranks the label positions; the highest are kept."""

    quota: Quota = field(default_factory=PerSample)
    """How many of each sample are kept."""

    keep_share: float = 0.5
    """Share of the label positions that are kept in a sparse step; 1.0 makes every step dense."""

    first_layer: int = 1
    """Index of the first gated decoder layer: how many layers before it see every token."""

    last_layer: int | None = None
    """Index after the last gated layer; null is the depth of the decoder."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Which steps are dense (see `schedule.*`)."""

    token_multiple: int = 1
    """Rows of kept tokens are a multiple of this length, filled with the next-best label positions
    and, where a sample has none left, with padding."""

    CHOICES: ClassVar[dict[str, Mapping[str, type[Any]]]] = {
        "execution": EXECUTIONS,
        "score": SCORES,
        "quota": QUOTAS,
    }
    """Fields that a file gives by name, with the method's own knobs under that name."""

    MOVED: ClassVar[dict[str, str]] = {
        "total_steps": "schedule.total_steps",
        "warmup": "schedule.warmup",
        "cycle_steps": "schedule.cycle_steps",
        "cycle_dense_steps": "schedule.cycle_dense_steps",
        "final_dense_share": "schedule.final_dense_share",
        "fusion": "fused.fusion",
        "reference_weight": "fused.reference_weight",
        "decay": "fused.decay",
        "align": "elide.align",
    }
    """Keys of older files, and where they stand now."""

    @classmethod
    def prepare(cls, values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Read older keys of a file where they stand now, saying so in one line each."""
        return moved_keys(values, cls.MOVED, where)

    def __post_init__(self) -> None:
        for key, problem in self._choice_problems():
            raise ValueError(f"{key}={getattr(self, key)!r}: {problem}")
        refuse_knobs(self, self._rules)

    def _choice_problems(self) -> list[tuple[str, str]]:
        kinds = {name: tuple(table.values()) for name, table in self.CHOICES.items()}
        kinds["schedule"] = (ScheduleConfig,)
        return [
            (name, f"must be {_one_of(allowed)}")
            for name, allowed in kinds.items()
            if not isinstance(getattr(self, name), allowed)
        ]

    def _rules(self) -> list[Rule]:
        last, first = self.last_layer, self.first_layer
        return [
            # Less would round to no position at all: k = ceil(p * n - 1e-9).
            ("keep_share", 1e-6 <= self.keep_share <= 1.0, "must be in [1e-6, 1]"),
            ("first_layer", first >= 0, "must be 0 or more"),
            (
                "last_layer",
                last is None or last > first,
                f"must be above first_layer={first}, or null for the decoder's depth",
            ),
            ("token_multiple", self.token_multiple >= 1, "must be at least 1"),
        ]

    @property
    def chooses(self) -> bool:
        """Whether sparse steps choose among label positions; else every step is dense."""
        return self.enabled and self.execution.chooses and self.keep_share < 1.0

    @property
    def needs_reference(self) -> bool:
        """Whether the teacher's losses are read."""
        return self.chooses and self.score.needs_reference

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Columns of the difficulty store that the run reads and updates."""
        return self.score.statistics if self.chooses else ()

    @property
    def method(self) -> Method:
        return Method(
            score=self.score,
            quota=self.quota,
            execution=self.execution,
            keep_share=self.keep_share,
        )


def require_config(key: str, config: object) -> None:
    """Refuse, by ValueError naming the argument ``key``, what is no RegateConfig: a dict, say."""
    if not isinstance(config, RegateConfig):
        raise ValueError(
            f"{key}={config!r}: must be a RegateConfig; write {key}=RegateConfig(keep_share=0.5)"
        )


def require_steps(total_steps: object) -> None:
    """Refuse, by ValueError, a length of a run that is not a whole number of optimizer steps."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(
            f"total_steps={total_steps!r}: must be a whole number, at least 1: the optimizer steps "
            "of the whole run"
        )


def _one_of(kinds: tuple[type[Any], ...]) -> str:
    names = ", ".join(kind.__name__ for kind in kinds)
    if len(kinds) == 1:
        return f"a {names}; write {names}(...)"
    package = kinds[0].__module__.rpartition(".")[0]
    return f"one of {names}; write {kinds[0].__name__}(...), from {package}'s modules"
