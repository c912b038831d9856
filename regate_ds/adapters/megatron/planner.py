"""Plan steps on the one rank of a replica that plans for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from regate_ds.adapters.session_state import Difficulty
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import StepPlan
from regate_ds.session import Regate


class Planner:
    """The session of a run. A step that is planned again before it is ended gets the same plan."""

    def __init__(
        self,
        session: Regate,
        difficulty: Difficulty | None,
        together: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """Plan with this session.

        together: makes a block in which an error on one data rank is an error on all."""
        self.session, self.difficulty = session, difficulty
        self._together = together
        self.plan: StepPlan | None = None
        self._keys: list[object] = []
        self._is_open = False

    def plan_step(self, read: Callable[[], Sequence[TokenBatch]]) -> StepPlan:
        """Return the plan of the tokens that ``read`` returns.

        If the host runs a step again before ``finish_step``, the step's plan is returned again.

        Collective over data ranks; an error on one of them is an error on all. RuntimeError if the
        step is not ended and ``read`` returns other samples.
        """
        if self._is_open:
            return self._replayed_plan(read)
        windows: list[Sequence[TokenBatch]] = []

        def remembering_read() -> Sequence[TokenBatch]:
            windows.append(read())
            return windows[0]

        self.plan = self.session.plan_step(remembering_read)
        self._keys, self._is_open = _keys(windows[0]), True
        return self.plan

    def _replayed_plan(self, read: Callable[[], Sequence[TokenBatch]]) -> StepPlan:
        assert self.plan is not None
        with self._together():
            if _keys(read()) != self._keys:
                raise RuntimeError(
                    f"step {self.plan.step} is planned but not ended, and the data now has other "
                    "samples; call `step` of what attach returned after each optimizer step"
                )
        return self.plan

    def abandon_step(self) -> None:
        """Forget a step that is planned and not ended."""
        self.session.abandon_step()
        self._is_open = False

    def finish_step(self, losses: Sequence[Tensor], *, applied: bool) -> None:
        """End the step. Collective over data ranks.

        losses: for each micro-batch the losses of its targets [L], in reading order.

        RuntimeError if no step is planned.
        """
        if not self._is_open:
            raise RuntimeError(
                f"no step is planned, so step {self.session.step} cannot be ended; call `step` "
                "once after each training step"
            )
        assert self.plan is not None
        for plan, losses_L in zip(self.plan.micro, losses, strict=True):
            self.session.record(plan, losses_L)
        self.session.finish_step(applied=applied)
        self._is_open = False


def _keys(window: Sequence[TokenBatch]) -> list[object]:
    return [batch.flat_keys for batch in window]
