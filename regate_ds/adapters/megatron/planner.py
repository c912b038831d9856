"""The rank of a replica that plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from regate_ds.adapters.session_state import Difficulty
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import StepPlan
from regate_ds.session import Regate


class Planner:
    """Holds the session. A step may be planned again before it is ended: a replay of the same."""

    def __init__(
        self,
        session: Regate,
        difficulty: Difficulty | None,
        together: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """together: in which an error on one data rank is an error on all."""
        self.session, self.difficulty = session, difficulty
        self._together = together
        self.plan: StepPlan | None = None
        self._keys: list[object] = []
        self._is_open = False

    def plan_step(self, read: Callable[[], Sequence[TokenBatch]]) -> StepPlan:
        """The plan of what is read; the same again if the host runs the same step once more.

        Collective over data ranks; an error on one of them is an error on all.
        """
        if self._is_open:
            return self._planned_again(read)
        found: list[Sequence[TokenBatch]] = []

        def reading() -> Sequence[TokenBatch]:
            found.append(read())
            return found[0]

        self.plan = self.session.plan_step(reading)
        self._keys, self._is_open = _keys(found[0]), True
        return self.plan

    def _planned_again(self, read: Callable[[], Sequence[TokenBatch]]) -> StepPlan:
        assert self.plan is not None
        with self._together():
            if _keys(read()) != self._keys:
                raise RuntimeError(
                    f"step {self.plan.step} is planned but not ended, and this is other data; call "
                    "`step` of what attach returned after each optimizer step"
                )
        return self.plan

    def abandon_step(self) -> None:
        self.session.abandon_step()
        self._is_open = False

    def finish_step(self, losses: Sequence[Tensor], *, applied: bool) -> None:
        """Losses of each micro-batch's targets, in reading order. Collective over data ranks."""
        if not self._is_open:
            raise RuntimeError(
                "no step is planned that could be ended; call `step` once after each training step"
            )
        assert self.plan is not None
        for plan, losses_L in zip(self.plan.micro, losses, strict=True):
            self.session.record(plan, losses_L)
        self.session.finish_step(applied=applied)
        self._is_open = False


def _keys(window: Sequence[TokenBatch]) -> list[object]:
    return [batch.flat_keys for batch in window]
