"""Plan steps on the one rank of a replica that plans for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from regate_ds.adapters.session_state import Opened
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import StepPlan


class Planner:
    """The session of a run. A step that is planned again before it is ended gets the same plan."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self._plan: StepPlan | None = None
        """The plan of a step that is not ended."""
        self._keys: list[object] = []

    def plan_step(self, read: Callable[[], Sequence[TokenBatch]]) -> StepPlan:
        """Return the plan of the tokens that ``read`` returns.

        If the host runs a step again before ``finish_step``, the step's plan is returned again.

        Collective over data ranks; an error on one of them is an error on all. RuntimeError if the
        step is not ended and ``read`` returns other samples.
        """
        if self._plan is not None:
            return self._replayed_plan(self._plan, read)
        windows: list[Sequence[TokenBatch]] = []

        def remembering_read() -> Sequence[TokenBatch]:
            windows.append(read())
            return windows[0]

        self._plan = self.opened.session.plan_step(remembering_read)
        self._keys = _keys(windows[0])
        return self._plan

    def _replayed_plan(self, plan: StepPlan, read: Callable[[], Sequence[TokenBatch]]) -> StepPlan:
        with self.opened.session.together():
            if _keys(read()) != self._keys:
                raise RuntimeError(
                    f"step {plan.step} is planned but not ended, and the data now has other "
                    "samples; call `step` of what attach returned after each optimizer step"
                )
        return plan

    def ranks_answers(self) -> bool:
        """Return whether the step that is planned next ranks answers by what the score reads."""
        session = self.opened.session
        return session.chooses_answers(session.coming_step)

    def abandon_step(self) -> None:
        """Forget a step that is planned and not ended."""
        self.opened.session.abandon_step()
        self._plan = None

    def finish_step(self, values: Mapping[str, Sequence[Tensor]], *, applied: bool) -> None:
        """End the step. Collective over data ranks.

        values: for each micro-batch the losses of its targets [L], in reading order, as ``loss``,
            and what else the score asks for, by name.

        RuntimeError if no step is planned.
        """
        session = self.opened.session
        if self._plan is None:
            raise RuntimeError(
                f"no step is planned, so step {session.step} cannot be ended; call `step` once "
                "after each training step"
            )
        losses, others = values["loss"], {of: each for of, each in values.items() if of != "loss"}
        for number, plan in enumerate(self._plan.micro):
            others_L = {of: each[number] for of, each in others.items()}
            session.record(plan, losses[number], **others_L)
        session.finish_step(applied=applied)
        self._plan = None


def _keys(window: Sequence[TokenBatch]) -> list[object]:
    return [batch.flat_keys for batch in window]
