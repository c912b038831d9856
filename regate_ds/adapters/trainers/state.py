"""Steps and state of the method, when a Trainer ends its own steps, saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from regate_ds.adapters.torch.checks import warn_if_never_sparse
from regate_ds.adapters.torch.plain import Loop


class StateCallback(TrainerCallback):
    """End the method's steps, and save and load its state, when Trainer does so with its own."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        trainer.regate.total_steps = state.max_steps
        warn_if_never_sparse(trainer.regate.config, state.max_steps)
        resume = trainer._resume_from
        if resume:
            folder = get_last_checkpoint(args.output_dir) if resume is True else resume
            trainer.regate.load(folder)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self._trainer
        applied = (
            trainer.model_wrapped.was_step_applied()
            if trainer.is_deepspeed_enabled
            else not trainer.accelerator.optimizer_step_was_skipped
        )
        trainer.regate.step(applied=applied)
        trainer.since_log.add({**trainer.regate.metrics(), **trainer.regate.figures()})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.regate.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def loop_of(trainer: Any) -> Any:
    """Return what runs the Trainer's steps: an engine, or a loop in which nobody divides by the
    accumulation, as ``loss_is_scaled_for_ga`` has it."""
    if trainer.is_deepspeed_enabled:
        return trainer.model_wrapped
    args = trainer.args
    accumulation, group = args.gradient_accumulation_steps, group_of(trainer)
    return Loop(accumulation=accumulation, group=group, device=args.device)


def group_of(trainer: Any) -> Any:
    """Return the ranks that see different samples; None if there is one."""
    return dist.group.WORLD if trainer.args.world_size > 1 else None
