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
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from regate_ds.adapters.computed import Reference
from regate_ds.adapters.huggingface.wishes import NO_WISHES, Wishes
from regate_ds.adapters.torch.attach import attach
from regate_ds.adapters.torch.loop import LoopRegate
from regate_ds.adapters.trainers.limits import require_supported
from regate_ds.adapters.trainers.logged import SinceLog
from regate_ds.adapters.trainers.renamed import load_renamed, lost_weights
from regate_ds.adapters.trainers.scored import Scored
from regate_ds.adapters.trainers.state import StateCallback, group_of, loop_of
from regate_ds.adapters.window import PLAN
from regate_ds.config import RegateConfig, require_config
from regate_ds.data.keyed import IMAGES, KEY, PlainCollate
from regate_ds.stores.image_orders.reader import ImageOrderStore

NAME = "train"
"""In the keys of its samples, the name of a data set that the trainer has prepared itself."""


class RegateMixin:
    """Add ReGATE to a Trainer class: name this one before the Trainer among your base classes."""

    keyed_by_user = ", in Keyed(dataset, name)"
    _host_class: type = Trainer
    _wishes: Wishes = NO_WISHES

    def __init__(
        self: Any,
        *args: Any,
        regate: RegateConfig,
        reference: Reference | Scored | None = None,
        orders: ImageOrderStore | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the host's Trainer of the other arguments, and attach to its model.

        reference: the teacher's losses of the training set, a ``Scored`` that has them computed
            here, or an online teacher.

        ValueError names what is not supported.
        """
        require_config("regate", regate)
        super().__init__(*args, **kwargs)
        self._resume_from: str | bool | None = None
        self._lost: list[str] = []
        self.since_log = SinceLog()
        if regate.enabled:
            require_supported(self)
            self._make_ready()
            # Trainer keeps the columns that the model's forward takes; read them before attach
            # replaces that forward.
            self._set_signature_columns_if_needed()
            self._signature_columns += [KEY, IMAGES]
            self.add_callback(StateCallback(self))
        if isinstance(reference, Scored):
            is_read = regate.enabled and regate.needs_reference
            reference = self._losses_of(reference) if is_read else None
        self.regate: LoopRegate = attach(
            self.model, regate, reference=reference, orders=orders, wishes=self._wishes
        )
        if regate.enabled:
            # Our loss is already a mean over all targets of the step.
            self.loss_is_scaled_for_ga = True

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        self._resume_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, *args: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args)
        self._load_lost(resume_from_checkpoint)

    def _load_best_model(self: Any) -> None:
        super()._load_best_model()
        self._load_lost(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self: Any, load_result: Any) -> None:
        super()._issue_warnings_after_load(load_result)
        if not self.is_fsdp_enabled:
            self._lost = lost_weights(self.model, load_result.missing_keys)

    def _load_lost(self: Any, folder: str) -> None:
        """Load what Trainer has just not found in a checkpoint, unless the run is Trainer's own."""
        lost, self._lost = self._lost, []
        if lost and self.regate.config.enabled:
            load_renamed(self.model, folder, lost)

    def get_train_dataloader(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._collating(self._train_collate()):
            return super().get_train_dataloader(*args, **kwargs)

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
        return list(self.regate.window(micro, loop_of(self))), None

    def compute_loss(
        self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if PLAN not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        output = model(**inputs)
        loss = self._loss_of(output)
        return (loss, output) if return_outputs else loss

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the method's figures beside the training loss (see ``SinceLog``)."""
        if "loss" in logs:
            logs.update(self.since_log.take())
        super().log(logs, *args, **kwargs)

    def has_own_compute_loss(self: Any) -> bool:
        """Return whether a class between this one and the host's Trainer computes the loss."""
        found = super().compute_loss.__func__  # type: ignore[misc]
        return found is not self._host_class.compute_loss

    def _loss_of(self: Any, output: Any) -> Tensor:
        loss = self.regate.loss(output)
        if self.is_deepspeed_enabled:
            # Trainer tells the engine not to divide by the number of micro-batches, so we do it.
            loss = loss / self.model_wrapped.gradient_accumulation_steps()
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            # Before transformers 5.19 Trainer divides by the micro-batches all the same.
            loss = loss * self.current_gradient_accumulation_steps
        return loss

    def _make_ready(self) -> None:
        """Refuse what the host's own class can do and elision cannot, and name the samples."""

    def _losses_of(self: Any, scored: Scored) -> Reference:
        return scored.compute(self, self.train_dataset, self.data_collator, group_of(self))

    def _train_collate(self: Any) -> Any:
        return self.regate.collate(self.data_collator)

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
