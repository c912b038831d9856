"""ReGATE in ``transformers.Trainer``: add one base class and two arguments.

    class MyTrainer(RegateMixin, Trainer): ...

    trainer = MyTrainer(
        model=model, args=args, train_dataset=Keyed(data, "mine"), data_collator=collate,
        regate=RegateConfig(), reference=ReferenceStore("store"),
    )

Use ``RegateTrainer`` if you have no Trainer class of your own. A window is what Trainer takes for
one optimizer step: ``gradient_accumulation_steps`` micro-batches, or fewer at the end of an epoch.
Checkpoints hold the method's state beside Trainer's own, and ``train(resume_from_checkpoint=...)``
loads both. Evaluation and prediction call the model without a plan, so they get the host's model.
With ``enabled=False`` the run is Trainer's own.

Tested with transformers 5.24 and accelerate 1.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from regate_ds.adapters.torch.accelerator import AcceleratorHost
from regate_ds.adapters.torch.attach import attach
from regate_ds.adapters.torch.checks import warn_if_never_sparse
from regate_ds.adapters.torch.loop import LoopRegate
from regate_ds.adapters.torch.plain import Loop
from regate_ds.adapters.window import PLAN
from regate_ds.config import RegateConfig, require_config
from regate_ds.data.keyed import IMAGES, KEY, PlainCollate
from regate_ds.stores.image_orders.reader import ImageOrderStore
from regate_ds.stores.reference.reader import ReferenceStore


class RegateMixin:
    """Add ReGATE to a Trainer class: name this one before the Trainer among your base classes."""

    def __init__(
        self: Any,
        *args: Any,
        regate: RegateConfig,
        reference: ReferenceStore | None = None,
        orders: ImageOrderStore | None = None,
        **kwargs: Any,
    ) -> None:
        require_config("regate", regate)
        super().__init__(*args, **kwargs)
        self._resume_from: str | bool | None = None
        if regate.enabled:
            _require_supported(self)
            # Trainer keeps the columns that the model's forward takes; read them before attach
            # replaces that forward.
            self._set_signature_columns_if_needed()
            self._signature_columns += [KEY, IMAGES]
            self.add_callback(_StateCallback(self))
        self.regate: LoopRegate = attach(self.model, regate, reference=reference, orders=orders)
        if regate.enabled:
            # Our loss is already a mean over all targets of the step.
            self.loss_is_scaled_for_ga = True

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        self._resume_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self: Any) -> Any:
        with self._collating(self.regate.collate(self.data_collator)):
            return super().get_train_dataloader()

    def get_eval_dataloader(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._collating(PlainCollate(self.data_collator)):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._collating(PlainCollate(self.data_collator)):
            return super().get_test_dataloader(*args, **kwargs)

    def get_batch_samples(
        self: Any, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step, each with its plan among its inputs."""
        if not self.regate.config.enabled:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        micro = list(islice(epoch_iterator, num_batches))
        if not micro:
            return [], None
        return list(self.regate.window(micro, _host_of(self))), None

    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if PLAN not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        output = model(**inputs)
        loss = self.regate.loss(output)
        if self.is_deepspeed_enabled:
            # Trainer tells the engine not to divide by the number of micro-batches, so we do it.
            loss = loss / self.model_wrapped.gradient_accumulation_steps()
        return (loss, output) if return_outputs else loss

    @contextmanager
    def _collating(self: Any, collate: Any) -> Iterator[None]:
        """Use ``collate`` as the data collator inside the block."""
        host_collator, self.data_collator = self.data_collator, collate
        try:
            yield
        finally:
            self.data_collator = host_collator


class RegateTrainer(RegateMixin, Trainer):
    """``transformers.Trainer`` with the arguments ``regate``, ``reference`` and ``orders``."""


class _StateCallback(TrainerCallback):
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

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.regate.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _host_of(trainer: Any) -> Any:
    """Return what runs the Trainer's steps: an engine, or a loop in which nobody divides by the
    accumulation, as ``loss_is_scaled_for_ga`` has it."""
    if trainer.is_deepspeed_enabled:
        return trainer.model_wrapped
    args = trainer.args
    group = dist.group.WORLD if args.world_size > 1 else None
    return Loop(accumulation=args.gradient_accumulation_steps, group=group, device=args.device)


def _require_supported(trainer: Any) -> None:
    """Refuse settings of Trainer that ReGATE would silently not honour: ValueError names one."""
    args = trainer.args
    sampling = args.train_sampling_strategy
    kind = type(trainer.train_dataset).__name__
    overrides_loss = super(RegateMixin, trainer).compute_loss.__func__ is not Trainer.compute_loss
    refused = {
        f"{args.n_gpu} GPUs in one process (DataParallel); start one process a GPU, as torchrun "
        "does": args.n_gpu > 1,
        "FSDP1, which hides the model's parameters; set version to 2 in fsdp_config": (
            trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1
        ),
        "a model that from_pretrained(distributed_config=...) has sharded; leave that to Trainer's "
        "fsdp": trainer.is_distributed_loading_by_transformers,
        "average_tokens_across_devices=False, as the loss is the mean over the targets of all "
        "ranks; set it True": args.world_size > 1 and not args.average_tokens_across_devices,
        f"train_dataset={kind}, which does not name its samples; use a map-style data set, in "
        "Keyed(dataset, name)": isinstance(trainer.train_dataset, IterableDataset),
        f"label_smoothing_factor={args.label_smoothing_factor}, as the teacher's losses and ours "
        "are without it; set it to 0": args.label_smoothing_factor != 0,
        f"train_sampling_strategy={sampling}, which looks into items by name or length; use random "
        "or sequential": sampling not in ("random", "sequential"),
        f"compute_loss_func={trainer.compute_loss_func}, as elision computes the loss of kept "
        "targets itself; leave it out": trainer.compute_loss_func is not None,
        f"a compute_loss of your own ({type(trainer).__name__}), which elision would not call; "
        "remove it": overrides_loss,
        "torch_compile=True; set it False and compile each decoder layer": args.torch_compile,
        "use_liger_kernel=True, which replaces the forward that elision wraps; set it False": (
            args.use_liger_kernel
        ),
        "auto_find_batch_size=True, as a step is planned with the size of its batches; set it "
        "False": args.auto_find_batch_size,
        "accelerator_config.dispatch_batches=True, as plans are made on the rank that reads the "
        "data; set it False": bool(args.accelerator_config.dispatch_batches),
    }
    for reason, is_so in refused.items():
        if is_so:
            raise ValueError(f"elision in Trainer is not supported with {reason}")
    if not trainer.is_deepspeed_enabled:
        AcceleratorHost(trainer.accelerator, trainer.model).require()
