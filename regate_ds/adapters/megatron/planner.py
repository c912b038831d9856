"""The rank of a replica that plans."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.data.difficulty_store import DifficultyStore
from regate_ds.session import Regate, StepPlan


class Planner:
    """Holds the session. A step may be planned again before it is ended: a replay of the same."""

    def __init__(self, session: Regate, difficulty: DifficultyStore | None) -> None:
        self.session, self.difficulty = session, difficulty
        self.plan: StepPlan | None = None
        self._keys: list[object] = []
        self._is_open = False

    def plan_step(self, window: Sequence[TokenBatch]) -> StepPlan:
        """The plan of this window; the same again if the host runs the same step once more."""
        keys = [batch.flat_keys for batch in window]
        if self._is_open and keys == self._keys:
            assert self.plan is not None
            return self.plan
        self.plan = self.session.plan_step(window)
        self._keys, self._is_open = keys, True
        return self.plan

    def finish_step(self, losses: Sequence[Tensor], *, applied: bool) -> None:
        """Losses of each micro-batch's targets, in reading order. Collective over data ranks."""
        assert self.plan is not None
        for plan, losses_L in zip(self.plan.micro, losses, strict=True):
            self.session.record(plan, losses_L)
        self.session.finish_step(applied=applied)
        self._is_open = False
