"""One run of the method: plan a step, take back its losses, remember what is still hard.

A step is ``plan_step`` -> the host's forward and backward passes -> ``record`` per micro-batch
-> ``finish_step``. The session scales no loss, calls no framework and touches no file.
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
    """A step between its plan and its end."""

    plan: StepPlan
    window: Sequence[TokenBatch]
    difficulty: list[Tensor]
    losses: dict[int, Tensor] = field(default_factory=dict)


class Regate:
    """The method's state: the step number, and through the difficulty store what is still hard."""

    def __init__(
        self,
        config: RegateConfig,
        *,
        reference: Values | None,
        difficulty: MutableValues | None,
        layout: ParallelLayout | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """``device``: where the backend of the layout's groups wants its tensors."""
        self.config = config
        self.schedule = schedule_of(config)
        self.step = 0
        self.equal_slots = False
        """Rows of all micro-batches of a step are brought to one length, for hosts whose shapes
        must not change within a step."""
        self.one_row = False
        """Kept tokens of a micro-batch lie behind one another: token_multiple is of them all."""
        self.padding: Callable[[ElisionPlan], int] = attrgetter("num_padded")
        """Rows of a plan that hold nothing, for hosts that lay them out in their own way."""
        self._layout, self._device = layout or ParallelLayout(), device
        self._open: _Open | None = None
        if self.elides and (reference is None or difficulty is None):
            raise ValueError(
                f"keep_share={config.keep_share} needs the teacher's losses: give a "
                "ReferenceStore, or an online teacher, or set keep_share=1.0 for the dense run"
            )
        self._reference, self._difficulty = reference, difficulty

    @property
    def elides(self) -> bool:
        """False for the dense baseline, which needs neither reference nor difficulty."""
        return self.config.keep_share < 1.0

    @property
    def coming_step(self) -> int:
        """The step that is planned next."""
        return self.step + (self._open is not None)

    def is_dense(self, step: int) -> bool:
        return not self.elides or self.schedule.is_dense(step)

    def plan_step(
        self, window: Sequence[TokenBatch] | Callable[[], Sequence[TokenBatch]]
    ) -> StepPlan:
        """Decide for all micro-batches of the coming optimizer step. Collective over data ranks.

        window: or what reads it, whose error is then an error on all data ranks.

        Raises ValueError if the run is over or the step has no target on any rank, RuntimeError if
        the step before is still open, or if another data rank raises.
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
        """Take the per-target losses of one micro-batch's forward pass; they may be on a device."""
        current = self._require_open("record")
        if plan.step != self.step or plan.micro in current.losses:
            raise RuntimeError(
                f"losses of step {plan.step}, micro-batch {plan.micro} do not belong here: step "
                f"{self.step} is open and has micro-batches {sorted(current.losses)} already"
            )
        if losses_L.shape != (plan.num_targets,):
            raise ValueError(f"{plan.num_targets} targets, but losses {tuple(losses_L.shape)}")
        current.losses[plan.micro] = losses_L.detach()

    def finish_step(self, *, applied: bool) -> None:
        """End the step. ``applied`` False (an overflow, say) changes no difficulty. Collective.

        RuntimeError names the sample whose loss is not finite, on all data ranks; nothing is
        remembered then.
        """
        with all_or_none(self._layout.data, self._device):
            current = self._require_open("finish_step")
            missing = set(range(len(current.plan.micro))) - set(current.losses)
            if missing:
                raise RuntimeError(
                    f"step {self.step}: no losses of micro-batches {sorted(missing)}"
                )
            updated = self._updated(current) if self.elides and applied else None
        if updated is not None:
            assert self._difficulty is not None
            keys = [key for batch in current.window for key in batch.flat_keys]
            self._difficulty.write(keys, updated)
        self._open = None
        self.step += 1

    def abandon_step(self) -> None:
        """Forget the plan of a step that the host will not end. It is planned anew, by the same
        numbers."""
        self._open = None

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state; the difficulty store saves itself beside it."""
        if self._open is not None:
            raise RuntimeError(f"step {self.step} is open; save between steps")
        return {"version": 1, "step": self.step, **asdict(self.schedule)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["total_steps"] != self.config.total_steps:
            raise ValueError(
                f"total_steps={self.config.total_steps}, but the checkpoint's run has "
                f"{state['total_steps']}: the schedule would change; resume with the same value"
            )
        for name, mine in asdict(self.schedule).items():
            if state[name] != mine:
                raise ValueError(
                    f"{name} is {mine} by this configuration, but {state[name]} in the "
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
        """Difficulty of all label positions of the window after the step."""
        updated = [
            updated_difficulty(batch, plan, old_N, current.losses[plan.micro], self.config.decay)
            for batch, plan, old_N in zip(
                current.window, current.plan.micro, current.difficulty, strict=True
            )
        ]
        return torch.cat(updated)
