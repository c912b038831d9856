"""One rank's part in a training run around Megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.megatron.chunks import require_finalized, require_schedule
from regate_ds.adapters.megatron.gates import ChunkGate
from regate_ds.adapters.megatron.groups import Axes
from regate_ds.adapters.megatron.local_plan import LocalPlan, localise
from regate_ds.adapters.megatron.place import Place, require_cut
from regate_ds.adapters.megatron.planner import Planner
from regate_ds.adapters.megatron.schedule import StepRun
from regate_ds.adapters.plan_wire import confirm, failing_together, share_plan
from regate_ds.adapters.session_state import load_state, save_state
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.config import RegateConfig
from regate_ds.parallel.collectives import gather_values
from regate_ds.parallel.layout import rank_in


def tokens_of(item: Any) -> TokenBatch:
    if not hasattr(item, "tokens"):
        raise ValueError(
            f"an item of data_iterator is a {type(item).__name__} without .tokens; give `tokens` "
            "to attach: partial(read_tokens, dataset=...) of host_tokens.py for dicts of Megatron's"
        )
    return item.tokens


def _taken(iterator: Any, number: int) -> list[Any]:
    items: list[Any] = []
    try:
        while len(items) < number:
            items.append(next(iterator))
    except StopIteration:
        raise ValueError(
            f"data_iterator ended after {len(items)} of a step's {number} micro-batches; give one "
            "that goes on"
        ) from None
    return items


@dataclass(frozen=True)
class Attached:
    """What was put into the model and beside it, on this rank."""

    attachment: Attachment
    gates: Sequence[ChunkGate]
    axes: Axes
    planner: Planner | None


class MegatronRegate:
    """One rank's part in a training run; made by ``attach``."""

    def __init__(
        self,
        config: RegateConfig,
        attached: Attached | None,
        tokens: Callable[[Any], TokenBatch],
    ) -> None:
        """attached: None leaves everything to the host."""
        self.config = config
        self._attached, self._tokens = attached, tokens
        self.run: StepRun | None = None
        """The step that runs or ran last: its shapes, bytes and losses on this rank."""

    def wrap(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """What to call in place of Megatron's forward-backward function, with its arguments.

        It plans the step, tells all ranks, and calls the host's. The host's loss function is
        replaced by the sum over the plan's targets. With ``forward_only`` it is the host's own.
        """
        attached = self._attached
        if attached is None:
            return schedule
        require_schedule(schedule)

        @wraps(schedule)
        def forward_backward(**arguments: Any) -> Any:
            if arguments.get("forward_only", False) or self._attached is None:
                return schedule(**arguments)
            require_finalized(attached.gates[0].gpt.config)
            micro = self._shared_plan(attached, arguments)
            self.run = StepRun(micro, attached.gates, attached.axes)
            return self.run.call(schedule, arguments)

        return forward_backward

    def step(self, *, applied: bool) -> None:
        """End an optimizer step; ``applied`` is what ``optimizer.step()`` said. All ranks call."""
        if self._attached is None or self.run is None:
            return
        axes, planner = self._attached.axes, self._attached.planner
        losses = self._collect(axes, self.run)
        if planner is not None:
            with failing_together(axes.planner, axes.replica):
                planner.finish_step(losses, applied=applied)
        confirm(axes.is_planner, axes.planner, axes.replica)

    def abandon(self) -> None:
        """Forget a step that was planned and will not be ended: a later job does it again."""
        if self._planner is not None:
            self._planner.abandon_step()

    def save(self, checkpoint_dir: str | Path) -> None:
        """Write schedule and difficulty into a checkpoint folder. All ranks call."""
        planner = self._planner
        if planner is not None:
            assert self._attached is not None
            first = rank_in(self._attached.axes.data) == 0
            save_state(checkpoint_dir, planner.session, planner.difficulty, is_first=first)

    def load(self, checkpoint_dir: str | Path) -> None:
        """Take over what ``save`` wrote, under any layout, and forget a step that is not ended.
        All ranks call."""
        planner = self._planner
        if planner is not None:
            planner.abandon_step()
            load_state(checkpoint_dir, planner.session, planner.difficulty)

    def metrics(self) -> dict[str, int | bool] | None:
        """Counts of the step planned last, over all data ranks; None on ranks that do not plan."""
        plan = self._planner.plan if self._planner is not None else None
        return None if plan is None else {"step": plan.step, "dense": plan.is_dense, **plan.counts}

    def remove(self) -> None:
        """Leave the model as it was before ``attach``."""
        if self._attached is not None:
            self._attached.attachment.remove()
            self._attached = None

    @property
    def _planner(self) -> Planner | None:
        """``None`` on ranks that do not plan, and where nothing is attached."""
        return None if self._attached is None else self._attached.planner

    def _window(self, place: Place, arguments: dict[str, Any]) -> list[TokenBatch]:
        """The step's tokens where they are planned; the schedule then reads the same items."""
        iterators = arguments["data_iterator"]
        several = isinstance(iterators, list)
        read = iterators[-1] if several else iterators
        items = _taken(read, arguments["num_microbatches"])
        arguments["data_iterator"] = [*iterators[:-1], iter(items)] if several else iter(items)
        window = [self._tokens(item) for item in items]
        require_cut(window, place)
        return window

    def _shared_plan(self, attached: Attached, arguments: dict[str, Any]) -> list[LocalPlan]:
        """The plan as every rank of the replica reads it. Collective over all replicas."""
        place, planned = attached.axes.place, None
        if attached.planner is not None:
            read = partial(self._window, place, arguments)
            with failing_together(attached.axes.planner, attached.axes.replica):
                planned = attached.planner.plan_step(read)
        sent = share_plan(planned, attached.axes.planner, attached.axes.replica)
        device = next(attached.gates[0].gpt.parameters()).device
        return [localise(micro, place).to(device) for micro in sent.micro]

    @staticmethod
    def _collect(axes: Axes, run: StepRun) -> list[Tensor]:
        """Losses of each micro-batch's targets in reading order, from all context ranks."""
        if not run.losses:
            return []
        collected = []
        size = axes.place.context_size
        for number, local in enumerate(run.micro):
            counts = torch.bincount(local.context_L, minlength=size).tolist()
            parts = gather_values(run.losses[number], counts, axes.context)
            losses_L = torch.empty(len(local.context_L), dtype=parts[0].dtype)
            for rank, part in enumerate(parts):
                losses_L[local.context_L == rank] = part.cpu()
            collected.append(losses_L)
        return collected
