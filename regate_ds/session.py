"""One run of the method: plan a step, take back its losses, remember what is still hard.

A step is ``plan_step`` -> the host's forward and backward passes -> ``record`` per micro-batch
-> ``finish_step``. The session scales no loss, calls no framework and touches no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.counts import COUNTS, count_step
from regate_ds.algorithm.plan import ElisionPlan, StepPlan
from regate_ds.algorithm.quotas.quota import QuotaState
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.window import plan_dense_window, window_keys
from regate_ds.config import RegateConfig, require_config, require_steps
from regate_ds.open_step import OpenStep
from regate_ds.parallel.layout import ParallelLayout, is_first
from regate_ds.run_schedule import require_same_schedule, schedule_state
from regate_ds.sparse_step import Chooser, MakePlans, require_stores
from regate_ds.stores.values import Stores

_Window = Sequence[TokenBatch]

STATE_FORMAT = 2
"""Version of what ``state_dict`` returns."""


class Regate:
    """The method's state: the step number, the quota's value, and the difficulty store."""

    def __init__(
        self,
        config: RegateConfig,
        stores: Stores,
        *,
        total_steps: int,
        layout: ParallelLayout | None = None,
        rows: RowLayout | None = None,
    ) -> None:
        """Open a run of ``total_steps`` optimizer steps.

        stores: the teacher's losses and the score's statistics, where the score needs them, and
            the orders of image tokens, where the ranking does.
        rows: how the host lays kept tokens out.

        ValueError if the configuration needs a store that is not given.
        """
        require_config("config", config)
        require_steps(total_steps)
        require_stores(config, stores)
        self.config, self.total_steps, self.step = config, total_steps, 0
        self.rows = rows or config.rows
        self._layout = layout or ParallelLayout()
        self._chooser = Chooser(
            config=config,
            stores=stores,
            schedules=config.schedules(total_steps),
            rows=self.rows,
            layout=self._layout,
        )
        self._quota_state: QuotaState = {}
        self._open: OpenStep | None = None
        self._difficulty = stores.difficulty if config.statistics else None
        merged_steps = self._chooser.schedules.start
        self.switch_figures: dict[str, float] = {}
        """What the step that ended last tells of the switch from patches to tokens."""
        self._switch = _switch_at(merged_steps) if merged_steps else None

    @property
    def is_first(self) -> bool:
        """Whether this is the first data rank: the one that writes what all share."""
        return is_first(self._layout.data)

    @property
    def coming_step(self) -> int:
        """The step that is planned next."""
        return self.step + (self._open is not None)

    def is_dense(self, step: int) -> bool:
        return self._chooser.schedules.is_dense(step)

    def chooses_answers(self, step: int) -> bool:
        """Whether a step ranks answers, and so reads what its score needs."""
        return self._chooser.schedules.chooses_answers(step)

    def plan_step(
        self, window: _Window | Callable[[], _Window], tally: Callable[[], Sequence[int]] = tuple
    ) -> StepPlan:
        """Decide for all micro-batches of the coming optimizer step. Collective over data ranks.

        window: the micro-batches, or a function that reads them, whose error is then an error on
            all data ranks.
        tally: returns integers of the host's own, equally many on each rank, that are summed over
            data ranks in the exchange of counts; it is called after ``window``.

        ValueError if the run is over or the step has no target on any rank, RuntimeError if the
        step before is still open, or if another data rank raises.
        """
        with self.together():
            batches, tallied = self._read(window), tally()
        keys = window_keys(batches)
        statistics = {} if self._difficulty is None else self._difficulty.read(keys)
        make, quota_state = self._chooser.choose(
            batches, step=self.step, statistics=statistics, quota_state=self._quota_state
        )
        plan = self._counted(batches, make, tallied, dense=self.is_dense(self.step))
        plan = replace(plan, is_merged=self._chooser.schedules.is_merged(self.step))
        if plan.num_targets_global == 0:
            raise ValueError(
                f"step {self.step} has no answer token on any rank; leave out samples without "
                f"answers, such as {', '.join(map(str, keys[:3]))} on this one"
            )
        self._open = OpenStep(plan, batches, statistics, quota_state)
        return plan

    def plan_evaluation(self, window: Callable[[], _Window]) -> StepPlan:
        """Return a plan of what ``window`` reads that elides nothing, and belongs to no step.

        Collective over data ranks, as ``plan_step``.
        """
        with self.together():
            batches = window()
        return self._counted(batches, partial(plan_dense_window, batches), dense=True)

    def _counted(
        self, window: _Window, make: MakePlans, tallied: Sequence[int] = (), *, dense: bool
    ) -> StepPlan:
        """Make the plans and count over all data ranks what they keep."""
        with self.together(num_values=len(COUNTS) + len(tallied)) as totals:
            micro = tuple(replace(one, step=self.step) for one in make())
            totals += [*count_step(window, micro, self.rows.num_padding), *tallied]
        counts: dict[str, int] = dict(zip(COUNTS, totals[: len(COUNTS)], strict=True))
        tallies = tuple(totals[len(COUNTS) :])
        return StepPlan(self.step, dense, micro, counts["answer_kept"], counts, tallies)

    def together(self, num_values: int = 0) -> Any:
        """Make an error on one data rank an error on all. Collective, when the block ends."""
        return self._chooser.together(num_values)

    def _read(self, window: _Window | Callable[[], _Window]) -> _Window:
        if self._open is not None:
            raise RuntimeError(
                f"step {self.step} is planned but not ended; end it before the next one is planned "
                "(finish_step, or `step` of what attach returned)"
            )
        if self.step >= self.total_steps:
            raise ValueError(
                f"step {self.step} is beyond total_steps={self.total_steps}; "
                "set total_steps to the optimizer steps of the whole run"
            )
        batches = window() if callable(window) else window
        if not batches:
            raise ValueError(f"the window of step {self.step} is empty; give its micro-batches")
        if self._difficulty is not None:
            self._difficulty.admit(batches)
        return batches

    def record(self, plan: ElisionPlan, losses_L: Tensor, **statistics_L: Tensor) -> None:
        """Take the losses of one micro-batch's targets; they may be on a device.

        statistics_L: further values of the targets, by the names that the score's statistics
        are made of.
        """
        self._require_open("record").record(plan, {"loss": losses_L, **statistics_L})

    def finish_step(self, *, applied: bool) -> None:
        """End the step. ``applied`` False (an overflow, say) changes no difficulty. Collective.

        RuntimeError names the sample of a loss that is to be remembered and is not finite, on all
        data ranks; nothing is remembered then.
        """
        with self.together():
            current = self._require_open("finish_step")
            current.require_complete()
            # A patch's losses are not those that the score would rank a token by.
            is_seen = applied and not current.plan.is_merged
            updated = current.updated(self.config.statistics) if is_seen else {}
        if updated and self._difficulty is not None:
            self._difficulty.write(window_keys(current.window), updated)
        if self._switch is not None:
            self.switch_figures = self._switch.figures(self.step, current)
        self._quota_state = current.quota_state
        self._open = None
        self.step += 1

    def abandon_step(self) -> None:
        """Forget the plan of a step that the host will not end. It is planned anew, by the same
        numbers."""
        self._open = None

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's and the quota's state; the difficulty store saves itself."""
        if self._open is not None:
            raise RuntimeError(f"step {self.step} is open; save between steps")
        own = {"version": STATE_FORMAT, "step": self.step, "quota": self._quota_state}
        return own | schedule_state(self.config, self.total_steps)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned, and forget a step that is not ended.

        ValueError as ``require_state``.
        """
        self.require_state(state)
        self.step, self._quota_state = state["step"], state["quota"]
        self._open = None

    def require_state(self, state: dict[str, Any]) -> None:
        """Refuse, by ValueError, a state of another format, length of the run or schedule."""
        if state.get("version") != STATE_FORMAT:
            raise ValueError(
                f"the checkpoint has state version {state.get('version')}, this version reads "
                f"{STATE_FORMAT}; start the run anew (regate train CONFIG, with another run.out)"
            )
        require_same_schedule(self.config, self.total_steps, state)

    def _require_open(self, call: str) -> OpenStep:
        if self._open is None:
            raise RuntimeError(f"{call} without a planned step; call plan_step first")
        return self._open


def _switch_at(first_step: int) -> Any:
    # Here, so that a run without merged steps does not load the file.
    from regate_ds.merge_switch import Switch

    return Switch(first_step)
