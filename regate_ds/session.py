"""One run of the method: plan a step, record its losses, remember which tokens are still hard.

A step is ``plan_step``, then the host's forward and backward passes with one ``record`` for each
micro-batch, then ``finish_step``. The session scales no loss, calls no framework and opens no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.counts import COUNTS, count_step
from regate_ds.algorithm.difficulty import updated_difficulty
from regate_ds.algorithm.plan import ElisionPlan, StepPlan, plan_dense, widen
from regate_ds.algorithm.select import fuse_scores, plan_ragged, plan_sparse
from regate_ds.config import RegateConfig, schedule_of
from regate_ds.parallel.collectives import all_or_none
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.stores.values import MutableValues, Values


@dataclass
class _Open:
    """A step that is planned but not finished."""

    plan: StepPlan
    window: Sequence[TokenBatch]
    difficulty: list[Tensor]
    losses: dict[int, Tensor] = field(default_factory=dict)


class Regate:
    """The state of the method: the step number, the open step and the difficulty store."""

    def __init__(
        self,
        config: RegateConfig,
        *,
        reference: Values | None,
        difficulty: MutableValues | None,
        layout: ParallelLayout | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start at step 0. ``device`` is where the backend of the layout's groups wants tensors."""
        self.config = config
        self.schedule = schedule_of(config)
        self.step = 0
        self.equal_slots = False
        """True widens all micro-batches of a step to one row length, for hosts whose shapes must
        not change within a step."""
        self.one_row = False
        """True (row format `ragged`) applies token_multiple to the micro-batch, not to each row."""
        self.padding: Callable[[ElisionPlan], int] = attrgetter("num_padded")
        """Counts the padding of a plan; a host with a row layout of its own replaces it."""
        self._layout, self._device = layout or ParallelLayout(), device
        self._open: _Open | None = None
        if self.elides and (reference is None or difficulty is None):
            raise ValueError(
                f"keep_share={config.keep_share} needs the teacher's losses: give a "
                "ReferenceStore, or an online teacher, or set keep_share=1.0 for a dense run"
            )
        self._reference, self._difficulty = reference, difficulty

    @property
    def elides(self) -> bool:
        """False for a dense run, which needs neither reference nor difficulty."""
        return self.config.keep_share < 1.0

    @property
    def coming_step(self) -> int:
        """Number of the step that the next call of ``plan_step`` plans."""
        return self.step + (self._open is not None)

    def is_dense(self, step: int) -> bool:
        return not self.elides or self.schedule.is_dense(step)

    def plan_step(
        self, window: Sequence[TokenBatch] | Callable[[], Sequence[TokenBatch]]
    ) -> StepPlan:
        """Plan all micro-batches of the coming optimizer step. Collective over data ranks.

        window: the micro-batches, or a function that reads them; if it fails, all data ranks raise.

        ValueError if the run is over or the step has no target on any rank. RuntimeError if the
        step before is still open, or if another data rank raises.
        """
        with all_or_none(self._layout.data, self._device):
            batches = self._read(window)
        difficulty = self._read_difficulty(batches)
        dense = self.is_dense(self.step)
        with all_or_none(self._layout.data, self._device, num_values=len(COUNTS)) as totals:
            micro = self._plan(batches, difficulty, dense=dense)
            totals += count_step(batches, micro, self.padding)
        counts: dict[str, int] = dict(zip(COUNTS, totals, strict=True))
        if counts["answer_kept"] == 0:
            raise ValueError(
                f"step {self.step} has no answer token on any rank; leave out samples without "
                "answers"
            )
        plan = StepPlan(self.step, dense, micro, counts["answer_kept"], counts)
        self._open = _Open(plan, batches, difficulty)
        return plan

    def _read(
        self, window: Sequence[TokenBatch] | Callable[[], Sequence[TokenBatch]]
    ) -> Sequence[TokenBatch]:
        if self._open is not None:
            raise RuntimeError(
                f"step {self.step} is planned but not ended; end it before the next one is planned "
                "(finish_step, or `step` of what attach returned)"
            )
        if self.step >= self.config.total_steps:
            raise ValueError(
                f"step {self.step} is beyond total_steps={self.config.total_steps}; "
                "set total_steps to the optimizer steps of the whole run"
            )
        batches = window() if callable(window) else window
        if self.elides:
            assert self._difficulty is not None
            self._difficulty.admit(batches)
        return batches

    def _plan(
        self, window: Sequence[TokenBatch], difficulty: list[Tensor], *, dense: bool
    ) -> tuple[ElisionPlan, ...]:
        micro = tuple(
            replace(
                plan_dense(batch) if dense else self._plan_sparse(batch, difficulty[i]),
                step=self.step,
                micro=i,
            )
            for i, batch in enumerate(window)
        )
        if not self.equal_slots:
            return micro
        longest = max(plan.num_slots for plan in micro)
        return tuple(widen(plan, longest) for plan in micro)

    def record(self, plan: ElisionPlan, losses_L: Tensor) -> None:
        """Take the loss of each target of one micro-batch of the open step, on any device."""
        current = self._require_open("record")
        if plan.step != self.step or plan.micro in current.losses:
            raise RuntimeError(
                f"losses of step {plan.step}, micro-batch {plan.micro} do not belong here: step "
                f"{self.step} is open and has micro-batches {sorted(current.losses)} already; "
                "record each micro-batch of the open step once"
            )
        if losses_L.shape != (plan.num_targets,):
            raise ValueError(
                f"step {plan.step}, micro-batch {plan.micro} has {plan.num_targets} targets, but "
                f"losses of shape {tuple(losses_L.shape)}; give one loss for each target"
            )
        current.losses[plan.micro] = losses_L.detach()

    def finish_step(self, *, applied: bool) -> None:
        """End the open step and update the difficulty. Collective over data ranks.

        applied: False (as after an overflow, where no weight changes) changes no difficulty.

        RuntimeError on all data ranks, with no difficulty changed, if losses are missing or one is
        not finite; it names the micro-batches or the sample.
        """
        with all_or_none(self._layout.data, self._device):
            current = self._require_open("finish_step")
            missing = set(range(len(current.plan.micro))) - set(current.losses)
            if missing:
                raise RuntimeError(
                    f"step {self.step}: no losses of micro-batches {sorted(missing)}; "
                    "record every micro-batch before finish_step"
                )
            updated = self._updated(current) if self.elides and applied else None
        if updated is not None:
            assert self._difficulty is not None
            keys = [key for batch in current.window for key in batch.flat_keys]
            self._difficulty.write(keys, updated)
        self._open = None
        self.step += 1

    def abandon_step(self) -> None:
        """Forget the open step, which the host will not end. The next plan is of the same step."""
        self._open = None

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the schedule. The difficulty store is saved separately, beside it."""
        if self._open is not None:
            raise RuntimeError(f"step {self.step} is open; save between steps")
        return {"version": 1, "step": self.step, **asdict(self.schedule)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the step to the saved one. ValueError if the saved schedule is another one."""
        if state["total_steps"] != self.config.total_steps:
            raise ValueError(
                f"total_steps={self.config.total_steps}, but the checkpoint's run has "
                f"{state['total_steps']}: the schedule would change; resume with the same value"
            )
        for name, configured in asdict(self.schedule).items():
            if state[name] != configured:
                raise ValueError(
                    f"{name} is {configured} by this configuration, but {state[name]} in the "
                    "checkpoint's run: resume with the same warmup, cycles and final_dense_share"
                )
        self.step = state["step"]

    def _require_open(self, call: str) -> _Open:
        if self._open is None:
            raise RuntimeError(f"{call} without a planned step; call plan_step first")
        return self._open

    def _read_difficulty(self, window: Sequence[TokenBatch]) -> list[Tensor]:
        if not self.elides:
            return []
        assert self._difficulty is not None
        values_N = self._difficulty.read([key for batch in window for key in batch.flat_keys])
        return list(values_N.split([int(batch.is_label_BT.sum()) for batch in window]))

    def _plan_sparse(self, batch: TokenBatch, difficulty_N: Tensor) -> ElisionPlan:
        assert self._reference is not None
        config = self.config
        score_N = fuse_scores(
            self._reference.read(batch.flat_keys),
            difficulty_N,
            reference_weight=config.reference_weight,
            fusion=config.fusion,
        )
        plan = plan_ragged if self.one_row else plan_sparse
        return plan(
            batch,
            score_N,
            keep_share=config.keep_share,
            align=config.align,
            token_multiple=config.token_multiple,
        )

    def _updated(self, current: _Open) -> Tensor:
        """Return the difficulty of all label positions of the window after the step."""
        updated = [
            updated_difficulty(batch, plan, old_N, current.losses[plan.micro], self.config.decay)
            for batch, plan, old_N in zip(
                current.window, current.plan.micro, current.difficulty, strict=True
            )
        ]
        return torch.cat(updated)
