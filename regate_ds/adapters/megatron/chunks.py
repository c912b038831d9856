"""Find a model's chunks, and refuse wrappers, schedules and attachments that do not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import nn

TESTED_CORE = ("0.16.1", "0.19.2")
"""Versions of megatron-core that were tested, the oldest first."""


def find_chunks(models: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the GPTModel inside each wrapped chunk.

    ValueError if a chunk does not hold exactly one.
    """
    chunks = []
    for model in models:
        found = [m for m in model.modules() if isinstance(m, GPTModel)]
        if len(found) != 1:
            raise ValueError(
                f"{type(model).__name__} holds {len(found)} GPTModels, but one is needed; attach "
                "to the list of model chunks that the schedule gets"
            )
        chunks.append(found[0])
    return chunks


def require_free(chunks: Sequence[nn.Module], is_ours: Callable[[Any], bool]) -> None:
    """Refuse chunks whose forward call is regate's already: RuntimeError."""
    for gpt in chunks:
        replaced = vars(gpt).get("forward")
        if isinstance(replaced, partial) and is_ours(replaced.func):
            raise RuntimeError(
                f"regate is already attached to this {type(gpt).__name__}; remove() the other "
                "attachment first"
            )


def require_undivided(models: Sequence[nn.Module]) -> None:
    """Refuse wrappers that divide gradients, as ours are divided by the number of targets."""
    for module in [m for model in models for m in model.modules()]:
        # Only Megatron's DDP has this attribute; its `buffers` is a list, not nn.Module's method.
        if not hasattr(module, "expert_parallel_buffers"):
            continue
        wrapper: Any = module
        buffers = [*wrapper.buffers, *wrapper.expert_parallel_buffers]
        if any(buffer.gradient_scaling_factor != 1.0 for buffer in buffers):
            raise ValueError(
                f"{type(module).__name__} was built with calculate_per_token_loss=False: it "
                "divides gradients by the data ranks; set it True before the model is wrapped"
            )


def require_finalized(config: Any) -> None:
    """Refuse a configuration under which nothing divides gradients by the number of targets."""
    if config.finalize_model_grads_func is None:
        raise ValueError(
            "config.finalize_model_grads_func is None, but it must divide gradients by the step's "
            "number of targets; set it to megatron.core.distributed.finalize_model_grads before "
            "the first step"
        )


def require_schedule(schedule: Callable[..., Any]) -> None:
    """Refuse a schedule that lacks a parameter which regate must pass."""
    parameters = inspect.signature(schedule).parameters
    missing = [name for name in ("p2p_communicator", "pg_collection") if name not in parameters]
    if missing:
        raise ValueError(
            f"{getattr(schedule, '__name__', schedule)} takes no {', '.join(missing)}; give "
            f"what get_forward_backward_func of megatron-core {TESTED_CORE[0]} or newer returns"
        )
