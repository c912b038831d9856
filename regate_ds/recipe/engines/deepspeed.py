"""ZeroEngine: a run's steps through DeepSpeed's engine around the Hugging Face student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from regate_ds.adapters.torch.attach import attach
from regate_ds.adapters.torch.loop import LoopRegate, Window
from regate_ds.algorithm.plan import StepPlan
from regate_ds.data.collate import Batch
from regate_ds.job.process import Process
from regate_ds.recipe.config.deepspeed_json import deepspeed_config, zero_stage
from regate_ds.recipe.engines.base import Setup
from regate_ds.recipe.engines.universal import add_universal, converted, mended_stage_3
from regate_ds.recipe.evaluation.forward import Predict, dense_inference, predict
from regate_ds.recipe.optimizer import make_lr_schedule, make_optimizer
from regate_ds.recipe.saving.model import full_weights
from regate_ds.recipe.students.trainable import trainable


class ZeroEngine:
    """Runs steps under ZeRO stages 0 to 3; every rank is a data rank."""

    def __init__(
        self, engine: Any, regate: LoopRegate, process: Process, *, reads_universal: bool = False
    ) -> None:
        self.engine, self.regate, self._process = engine, regate, process
        self._reads_universal = reads_universal
        self._plain_norm: Tensor | None = None

    @classmethod
    def build(cls, setup: Setup) -> ZeroEngine:
        import deepspeed

        config = setup.config
        model = trainable(setup.corpus.student, config.model, seed=config.run.seed)
        regate = attach(
            model,
            config.elision,
            total_steps=setup.total_steps,
            reference=setup.computed.reference,
            orders=setup.computed.orders,
        )
        optimizer = make_optimizer(model, config.optimizer)
        settings = deepspeed_config(config, setup.process.world_size)
        is_cut_otherwise = bool(zero_stage(settings)) and setup.has_other_ranks
        if is_cut_otherwise:
            add_universal(settings)
        engine = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=make_lr_schedule(optimizer, config.optimizer, setup.total_steps),
            config=settings,
        )[0]
        return cls(engine, regate, setup.process, reads_universal=is_cut_otherwise)

    @property
    def model(self) -> nn.Module:
        return self.engine.module

    @property
    def lr(self) -> float:
        return self.engine.get_lr()[0]

    def windows(self, loader: Iterable[Batch]) -> Iterator[Window]:
        return self.regate.windows(loader, self.engine)

    def run_step(self, window: Window) -> list[Tensor]:
        losses = []
        for batch in window:
            loss = self.regate.loss(self.engine(**batch))
            self.engine.backward(loss)
            self._plain_norm = self._norm_of_weights()
            self.engine.step()
            losses.append(loss.detach())
        return losses

    def end_step(self) -> None:
        self.regate.step(applied=self.engine.was_step_applied())

    def plan(self) -> StepPlan | None:
        return self.regate.plan

    def counts(self) -> dict[str, Any] | None:
        return None if self.regate.plan is None else self.regate.metrics()

    def grad_norm(self) -> float | None:
        norm = self.engine.get_global_grad_norm()
        norm = self._plain_norm if norm is None else norm
        return None if norm is None else float(norm)

    def _norm_of_weights(self) -> Tensor | None:
        """Return the norm of the gradients as they lie at the weights, before they are clipped.

        None but at a step's end without ZeRO, where deepspeed 0.19.8 reports none itself.
        """
        reports = hasattr(self.engine.optimizer, "_global_grad_norm")
        if reports or not self.engine.is_gradient_accumulation_boundary():
            return None
        return get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    @contextmanager
    def answering(self) -> Iterator[Predict]:
        with dense_inference(self.model):
            yield partial(predict, self.model)

    def weights(self) -> dict[str, Tensor]:
        return full_weights(self.model, self._process)

    def save(self, checkpoint: Path) -> None:
        folder, tag = str(checkpoint.parent), checkpoint.name
        self.engine.save_checkpoint(folder, tag=tag, save_latest=False)
        self.regate.save(checkpoint)

    def load(self, checkpoint: Path) -> None:
        if self._reads_universal:
            with converted(checkpoint, self._process) as name, self._mended():
                self._load(checkpoint, name)
        else:
            self._load(checkpoint.parent, checkpoint.name)

    def _mended(self) -> AbstractContextManager[None]:
        is_stage_3 = self.engine.zero_optimization_stage() == 3
        return mended_stage_3(self.engine.optimizer.optimizer) if is_stage_3 else nullcontext()

    def _load(self, folder: Path, tag: str) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise FileNotFoundError("it lacks the files of DeepSpeed's engine")

    def load_method(self, checkpoint: Path) -> None:
        self.regate.load(checkpoint)
