"""ReGATE in a training loop around Megatron-core's schedules.

    regate = attach(model, RegateConfig(total_steps=T), reference=ReferenceStore(path))
    forward_backward = regate.wrap(get_forward_backward_func())
    ...
    forward_backward(forward_step_func=..., data_iterator=..., model=model, ...)
    update_successful, _, _ = optimizer.step()
    regate.step(applied=update_successful)

``model`` is the list of chunks, built and wrapped. On the rank of the last stage that reads data
(first tensor and context rank) ``tokens`` turns an item of the data iterator into a TokenBatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.megatron.bypass import Channel, open_channel
from regate_ds.adapters.megatron.gates import ChunkGate, Range
from regate_ds.adapters.megatron.groups import Axes, find_axes, group_device
from regate_ds.adapters.megatron.local_plan import (
    LocalPlan,
    Place,
    localise,
    ragged_padding,
    require_cut,
)
from regate_ds.adapters.megatron.planner import Planner
from regate_ds.adapters.megatron.schedule import StepRun
from regate_ds.adapters.megatron.support import (
    find_chunks,
    require_finalized,
    require_free,
    require_schedule,
    require_supported,
    require_undivided,
)
from regate_ds.adapters.plan_wire import confirm, failing_together, share
from regate_ds.adapters.saved_state import load_state, save_state
from regate_ds.adapters.session_state import open_session
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.config import RegateConfig
from regate_ds.parallel.collectives import all_or_none, gather_values
from regate_ds.parallel.layout import ParallelLayout, rank_in
from regate_ds.stores.reference.reader import ReferenceStore

Layout = Literal["sbhd", "thd"]


def attach(
    models: Sequence[nn.Module] | nn.Module,
    config: RegateConfig,
    *,
    reference: ReferenceStore | None = None,
    layout: Layout = "sbhd",
    tokens: Callable[[Any], TokenBatch] | None = None,
) -> MegatronRegate:
    """Put the gates into built model chunks. Collective over all ranks of the world.

    layout: ``sbhd`` keeps equally many rows of every sample in a step; ``thd`` packs what is kept,
        and needs an attention that takes packed sequences (Transformer Engine).
    tokens: reads an item of the data iterator where the plan is made; without it, items have
        ``.tokens``.

    ValueError names what is not supported; RuntimeError if the model is attached already. With
    enabled=False nothing is touched.
    """
    tokens = tokens or _tokens_of
    if not config.enabled:
        return MegatronRegate(config, None, tokens)
    models = [models] if isinstance(models, nn.Module) else models
    chunks = find_chunks(models)
    host: Any = chunks[0].config
    last = host.num_layers if config.last_layer is None else config.last_layer
    ends_early = last < host.num_layers
    require_free(chunks, lambda hook: isinstance(getattr(hook, "__self__", None), ChunkGate))
    require_supported(chunks, config, ragged=layout == "thd", ends_early=ends_early)
    require_undivided(models)
    axes = find_axes(host, ragged=layout == "thd", ends_early=ends_early)
    gated = Range(
        first=config.first_layer,
        last=last,
        ends_early=ends_early,
        split=axes.split,
        sequence=axes.sequence,
        channel=_channel(chunks, config.first_layer, last) if ends_early else None,
    )
    attachment = Attachment()
    planner = _planner(config, reference, axes) if axes.is_planner else None
    gates = [ChunkGate(gpt, gated, attachment) for gpt in chunks]
    return MegatronRegate(config, Attached(attachment, gates, axes, planner), tokens)


def _channel(chunks: Sequence[Any], first: int, last: int) -> Channel | None:
    """What elided rows take from stage to stage. Collective over the pipeline's ranks."""
    pipeline = mpu.get_pipeline_model_parallel_group()
    mine = chunks[0].decoder.layers[0].layer_number - 1
    starts: list[Any] = [None] * dist.get_world_size(pipeline)
    dist.all_gather_object(starts, mine, group=pipeline)
    # No interleaving here: each stage has the layers up to where the next one starts.
    gathers, restores = (
        max(stage for stage, start in enumerate(starts) if start <= max(0, layer))
        for layer in (first - 1, last)
    )
    return None if gathers == restores else open_channel(pipeline, gathers, restores)


def _tokens_of(item: Any) -> TokenBatch:
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


def _planner(config: RegateConfig, reference: ReferenceStore | None, axes: Axes) -> Planner:
    place = axes.place
    # Where context ranks cut every sample of ragged rows, each is filled up by itself.
    by_sample = place.ragged and place.context_size > 1
    multiple = place.cut.zigzag if by_sample else place.multiple
    config = replace(config, token_multiple=math.lcm(config.token_multiple, multiple))
    device, layout = group_device(), ParallelLayout(data=axes.data, replica=axes.replica)
    session, difficulty = open_session(config, reference, layout, device)
    session.equal_slots = not place.ragged
    session.one_row = place.ragged and not by_sample
    if place.ragged:
        session.padding = partial(ragged_padding, place=place)
    return Planner(session, difficulty, partial(all_or_none, axes.data, device))


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
        sent = share(planned, attached.axes.planner, attached.axes.replica)
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
