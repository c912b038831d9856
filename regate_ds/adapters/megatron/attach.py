"""Attach ReGATE to a model in a training loop around Megatron-core's schedules.

    regate = attach(model, RegateConfig(), total_steps=T, reference=ReferenceStore(path))
    forward_backward = regate.wrap(get_forward_backward_func())
    ...
    forward_backward(forward_step_func=..., data_iterator=..., model=model, ...)
    update_successful, _, _ = optimizer.step()
    regate.step(applied=update_successful)

``model`` is the list of model chunks, after they are built and wrapped. The rank of the last stage
that is also the first tensor and context rank makes the plan; there ``tokens`` turns an item of the
data iterator into a TokenBatch. Megatron's own dicts are read as they are, if the data set is
wrapped in ``Keyed``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import nn

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.computed import Computed, Reference
from regate_ds.adapters.megatron.bypass import Channel, open_channel
from regate_ds.adapters.megatron.chunks import (
    find_chunks,
    require_free,
    require_undivided,
)
from regate_ds.adapters.megatron.entropy import EntropyTap
from regate_ds.adapters.megatron.gates import ChunkGate, Range
from regate_ds.adapters.megatron.groups import Axes, find_axes, group_device
from regate_ds.adapters.megatron.local.place import Place
from regate_ds.adapters.megatron.local.plan import LocalPlan
from regate_ds.adapters.megatron.planner import Planner
from regate_ds.adapters.megatron.regate import Attached, MegatronRegate, tokens_of
from regate_ds.adapters.megatron.support import require_supported_chunks
from regate_ds.adapters.session_state import open_session
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.executions.execution import gated_span
from regate_ds.algorithm.executions.table import require_execution
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.rows import RowFormat
from regate_ds.config import RegateConfig, require_config
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.stores.image_orders.reader import ImageOrderStore
from regate_ds.teacher.online import OnlineReference


def attach(  # noqa: PLR0913 (a user's call: each argument by its name)
    models: Sequence[nn.Module] | nn.Module,
    config: RegateConfig,
    *,
    total_steps: int,
    reference: Reference | None = None,
    orders: ImageOrderStore | None = None,
    row_format: RowFormat = "padded",
    tokens: Callable[[Any], TokenBatch] | None = None,
) -> MegatronRegate:
    """Put the gates into model chunks that are built. Collective over all ranks of the world.

    total_steps: optimizer steps of the whole run; a resume must repeat it.
    reference: the teacher's losses; an online teacher, with an index, needs ``prepare`` each step.
    orders: the orders of the training set's image tokens; only rankings that read them need them.
    row_format: ``padded`` gives all rows of a step one length; ``ragged`` puts the kept tokens of a
        micro-batch one after the other, and needs an attention that takes packed sequences
        (Transformer Engine).
    tokens: reads an item of the data iterator on the rank that plans; without it, items have
        ``.tokens``, or are dicts of Megatron's names (``read_tokens``).

    ValueError names what is not supported; RuntimeError if the model is already attached. With
    enabled=False the model is not changed.
    """
    require_config("config", config)
    tokens, computed = tokens or tokens_of, Computed(reference, orders)
    if not config.enabled:
        return MegatronRegate(config, None, tokens)
    online = _online(config, computed)
    models = [models] if isinstance(models, nn.Module) else models
    chunks = find_chunks(models)
    host: Any = chunks[0].config
    last = host.num_layers if config.last_layer is None else config.last_layer
    ends_early = last < host.num_layers
    require_free(chunks, lambda method: isinstance(getattr(method, "__self__", None), ChunkGate))
    ragged = row_format == "ragged"
    require_supported_chunks(chunks, config, ragged=ragged, ends_early=ends_early)
    require_execution(config.execution, "megatron")
    merged = _merging(config, chunks, ragged=ragged)
    require_undivided(models)
    axes = find_axes(
        host, ragged=ragged, ends_early=ends_early, token_multiple=config.token_multiple
    )
    gated = _range(config, chunks, axes, last)
    attachment, planner = Attachment(), _planner(config, computed, axes, total_steps)
    gates = [ChunkGate(gpt, gated, attachment, merges=merged is not None) for gpt in chunks]
    if config.records("entropy") and chunks[-1].post_process:
        gates[-1].entropy = EntropyTap(chunks[-1], attachment)
    attached = Attached(attachment, gates, axes, planner, merged, online)
    return MegatronRegate(config, attached, tokens)


def _range(config: RegateConfig, chunks: Sequence[Any], axes: Axes, last: int) -> Range:
    """Return the gated layers of the model, up to ``last``. Collective over all ranks."""
    depth = chunks[0].config.num_layers
    span, ends_early = gated_span(config.execution.spans(config.first_layer, last)), last < depth
    # Without a span no row moves, and no layer is in the range.
    first, last = (span.first, span.last) if span is not None else (depth, last)
    return Range(
        first=first,
        last=last,
        ends_early=ends_early,
        split=axes.split,
        sequence=axes.sequence,
        context=axes.context,
        channel=_channel(chunks, first, last) if ends_early and span is not None else None,
    )


def _merging(
    config: RegateConfig, chunks: Sequence[Any], *, ragged: bool
) -> Callable[[ElisionPlan, Place], LocalPlan] | None:
    """Return what finds a rank's share of merged plans; None if no step is merged.

    ValueError if the chunks cannot be merged.
    """
    if not config.merge.steps:
        return None
    # Here, so that a run without merged steps does not load it.
    from regate_ds.adapters.merging.megatron import localise_patches, require_mergeable_chunks

    require_mergeable_chunks(chunks, ragged=ragged)
    return localise_patches


def _online(config: RegateConfig, computed: Computed) -> OnlineReference | None:
    """Return the online teacher, if the score reads it. ValueError as ``Computed.require``, and if
    it knows no data beforehand: every rank must know the samples."""
    computed.require(config, online=True)
    found = computed.reference if config.needs_reference else None
    if not isinstance(found, OnlineReference):
        return None
    # Without an index it raises, here where no gate is in the model yet.
    _ = found.index
    return found


def _planner(
    config: RegateConfig, computed: Computed, axes: Axes, total_steps: int
) -> Planner | None:
    """Open the session on the rank that plans for its replica; None on the others."""
    if dist.get_rank() != axes.replica.planner:
        return None
    layout = ParallelLayout(data=axes.data, device=group_device())
    rows = axes.place.rows
    return Planner(open_session(config, computed, layout, total_steps=total_steps, rows=rows))


def _channel(chunks: Sequence[Any], first: int, last: int) -> Channel | None:
    """Open the channel for elided rows between the stage that gathers and the one that restores.

    Collective over all ranks of the world. None on other stages, and if both are one stage.
    """
    pipeline = mpu.get_pipeline_model_parallel_group()
    first_layer_here = chunks[0].decoder.layers[0].layer_number - 1
    first_layers: list[Any] = [None] * dist.get_world_size(pipeline)
    dist.all_gather_object(first_layers, first_layer_here, group=pipeline)
    # Without interleaving, each stage has the layers up to the first layer of the next stage.
    gathers, restores = (
        max(stage for stage, start in enumerate(first_layers) if start <= max(0, layer))
        for layer in (first - 1, last)
    )
    return None if gathers == restores else open_channel(pipeline, gathers, restores)
