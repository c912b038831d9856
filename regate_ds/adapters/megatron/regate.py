"""One rank's part in a training run around Megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from regate_ds.adapters.megatron.local.place import Place, require_cut
from regate_ds.adapters.megatron.local.plan import LocalPlan, localise
from regate_ds.adapters.megatron.planner import Planner
from regate_ds.adapters.megatron.samples import read_tokens
from regate_ds.adapters.megatron.schedule import StepRun
from regate_ds.adapters.run import metrics_of
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan, StepPlan
from regate_ds.config import RegateConfig
from regate_ds.data.collate import Batch
from regate_ds.parallel.collectives import gather_values
from regate_ds.teacher.online import OnlineReference


def tokens_of(item: Any) -> TokenBatch:
    """Return ``item.tokens``, or what ``read_tokens`` reads of a dict; ValueError for others."""
    if isinstance(item, Mapping):
        return read_tokens(item)
    if not hasattr(item, "tokens"):
        raise ValueError(
            f"an item of data_iterator is a {type(item).__name__} without .tokens; give `tokens` "
            "to attach, which reads one"
        )
    return item.tokens


def _take(iterator: Any, number: int) -> list[Any]:
    """Read ``number`` items of the iterator; ValueError if it ends before that."""
    items: list[Any] = []
    try:
        while len(items) < number:
            items.append(next(iterator))
    except StopIteration:
        raise ValueError(
            f"data_iterator ended after {len(items)} of a step's {number} micro-batches; give one "
            "that repeats the data, or end the run before it ends"
        ) from None
    return items


@dataclass(frozen=True)
class Attached:
    """What ``attach`` made on this rank; ``planner`` is None on ranks that do not plan."""

    attachment: Attachment
    gates: Sequence[ChunkGate]
    axes: Axes
    planner: Planner | None
    localise_merged: Callable[[ElisionPlan, Place], LocalPlan] | None = None
    """Returns a rank's share of a merged plan; None if no step is merged."""

    online: OnlineReference | None = None
    """The teacher that scores while training, if the score reads one."""


class MegatronRegate:
    """One rank's part in a training run; ``attach`` makes it."""

    def __init__(
        self,
        config: RegateConfig,
        attached: Attached | None,
        tokens: Callable[[Any], TokenBatch],
    ) -> None:
        """Take what ``attach`` made; with attached=None every method leaves the run to the host."""
        self.config = config
        self._attached, self._tokens = attached, tokens
        self.plan: StepPlan | None = None
        """The plan of the current step, or of the last one."""
        self.run: StepRun | None = None
        """The current step or the last one: its shapes, bytes and losses on this rank."""

    def wrap(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """Return what to call in place of Megatron's forward-backward function.

        It takes the same arguments, plans the step, sends the plan to all ranks of the replica, and
        calls the host's function. The host's loss is replaced by the sum of losses over the plan's
        targets. A call with ``forward_only`` goes to the host's function unchanged.

        ValueError if ``schedule`` does not take the arguments that regate must pass.
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

    def prepare(self, window: Sequence[Batch]) -> None:
        """Let an online teacher score the micro-batches of the coming step, if it ranks answers.

        Call it before the schedule, on all ranks, with what the ranks of a replica read alike: each
        of them scores its share. Without such a teacher it does nothing.
        """
        attached = self._attached
        if attached is None or attached.online is None:
            return
        planner = attached.planner
        if attached.axes.replica.ask(None if planner is None else planner.ranks_answers):
            attached.online.prepare(window, attached.axes.replica.group)
        else:
            attached.online.forget()

    def step(self, *, applied: bool) -> None:
        """End an optimizer step; ``applied`` is whether ``optimizer.step()`` changed the weights.

        All ranks must call it.
        """
        if self._attached is None or self.run is None:
            return
        axes, planner, end = self._attached.axes, self._planner, None
        values = {"loss": self.run.losses, "entropy": self.run.entropies}
        found = {of: self._collect(axes, self.run, each) for of, each in values.items() if each}
        if planner is not None:
            end = partial(planner.finish_step, found, applied=applied)
        axes.replica.confirm(end)

    def abandon(self) -> None:
        """Forget a step that is planned and will not be ended, as a later job runs it again."""
        if self._planner is not None:
            self._planner.abandon_step()

    def save(self, checkpoint_dir: str | Path) -> None:
        """Write schedule and difficulty into a checkpoint folder. All ranks must call it."""
        self._confirm(lambda planner: planner.opened.save(checkpoint_dir))

    def load(self, checkpoint_dir: str | Path) -> None:
        """Load what ``save`` wrote, and forget a step that is not ended. All ranks must call it.

        The parallel layout may differ from the saved one.
        """
        self.abandon()
        self._confirm(lambda planner: planner.opened.load(checkpoint_dir))

    def _confirm(self, call: Callable[[Planner], None]) -> None:
        """Call on the rank that plans; an error there is an error on all ranks of the replica."""
        if self._attached is not None:
            planner = self._planner
            mine = partial(call, planner) if planner is not None else None
            self._attached.axes.replica.confirm(mine)

    def metrics(self) -> dict[str, Any]:
        """Return counts of the step planned last, over all data ranks (see ``metrics_of``).

        With an online teacher, teacher_seconds is the time of scoring this step's samples on this
        rank.
        """
        online = None if self._attached is None else self._attached.online
        return metrics_of(self) | ({} if online is None else {"teacher_seconds": online.seconds})

    def remove(self) -> None:
        """Leave the model as it was before ``attach``."""
        if self._attached is not None:
            self._attached.attachment.remove()
            self._attached = None

    @property
    def _planner(self) -> Planner | None:
        """The planner; None on ranks that do not plan, and if nothing is attached."""
        return None if self._attached is None else self._attached.planner

    def _window(self, place: Place, arguments: dict[str, Any]) -> list[TokenBatch]:
        """Read the step's tokens on the rank that plans.

        The data iterator in ``arguments`` is replaced by one over the same items, which the
        schedule then reads.
        """
        iterators = arguments["data_iterator"]
        is_list = isinstance(iterators, list)
        last = iterators[-1] if is_list else iterators
        items = _take(last, arguments["num_microbatches"])
        arguments["data_iterator"] = [*iterators[:-1], iter(items)] if is_list else iter(items)
        window = [self._tokens(item) for item in items]
        require_cut(window, place)
        return window

    def _shared_plan(self, attached: Attached, arguments: dict[str, Any]) -> list[LocalPlan]:
        """Return this rank's share of each micro-batch's plan, on the model's device.

        Collective over all ranks of the world.
        """
        place, make = attached.axes.place, None
        if attached.planner is not None:
            make = partial(attached.planner.plan_step, partial(self._window, place, arguments))
        self.plan = attached.axes.replica.share(make)
        device = next(attached.gates[0].gpt.parameters()).device
        share = localise
        if self.plan.is_merged:
            assert attached.localise_merged is not None
            share = attached.localise_merged
        return [share(micro, place).to(device) for micro in self.plan.micro]

    @staticmethod
    def _collect(axes: Axes, run: StepRun, values: Mapping[int, Tensor]) -> list[Tensor]:
        """Return the values of each micro-batch's targets in reading order, from all context ranks.

        Collective over context ranks of the last stage, which alone have values.
        """
        collected = []
        size = axes.place.context_size
        for number, local in enumerate(run.micro):
            counts = torch.bincount(local.context_L, minlength=size).tolist()
            parts = gather_values(values[number], counts, axes.context)
            values_L = torch.empty(len(local.context_L), dtype=parts[0].dtype)
            for rank, part in enumerate(parts):
                values_L[local.context_L == rank] = part.cpu()
            collected.append(values_L)
        return collected
