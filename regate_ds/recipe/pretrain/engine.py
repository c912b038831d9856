"""An objective's module in DeepSpeed's engine: main model and helper are trained as one.

A step's loss is the same on any number of ranks and micro-batches, up to rounding: each term is
divided by the number of its positions in the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.job.process import Process
from regate_ds.objectives.contract import Draw, TokenRows, weighted_loss
from regate_ds.parallel.collectives import sum_over, sum_tensor
from regate_ds.recipe.config.deepspeed_json import deepspeed_config, zero_stage
from regate_ds.recipe.optimizer import make_lr_schedule, make_optimizer
from regate_ds.recipe.pretrain.config import PretrainTree
from regate_ds.recipe.saving.contents import Checkpoint

Asked = Sequence[tuple[TokenRows, Draw]]
"""The micro-batches of one optimizer step, on this rank."""


class PretrainEngine:
    """Runs steps under ZeRO stages 0 to 2; every rank is a data rank."""

    def __init__(self, engine: Any, config: PretrainTree, process: Process) -> None:
        self.engine, self._config, self._process = engine, config, process

    @classmethod
    def build(
        cls, module: nn.Module, config: PretrainTree, process: Process, saved: Checkpoint | None
    ) -> PretrainEngine:
        import deepspeed

        settings = deepspeed_config(config, process.world_size)
        _require_stage(zero_stage(settings), process, saved)
        optimizer = make_optimizer(module, config.optimizer)
        engine = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=make_lr_schedule(optimizer, config.optimizer, config.run.steps),
            config=settings,
        )[0]
        return cls(engine, config, process)

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        return self.engine.get_lr()[0]

    def run_step(self, window: Asked) -> dict[str, float]:
        """Run forward, backward and optimizer; return the mean of each term. Collective."""
        weights = self._config.objective.weights
        counts = self._counts(window)
        # DeepSpeed takes a mean over ranks and micro-batches, but these are shares of one loss.
        num_parts = len(window) * self._process.world_size
        sums = torch.zeros(len(weights), dtype=torch.float64, device=self._process.device)
        for rows, draw in window:
            losses = self.engine(*self._moved(rows, draw))
            self.engine.backward(weighted_loss(losses, counts, weights) * num_parts)
            self.engine.step()
            sums += _stacked(losses, weights)
        return self._means(sums, counts)

    @torch.no_grad()
    def mean_losses(self, micro_batches: Asked) -> dict[str, float]:
        """Return the mean of each term over the micro-batches of all ranks. Collective."""
        weights = self._config.objective.weights
        was_training = self.module.training
        self.module.eval()
        sums = torch.zeros(len(weights), dtype=torch.float64, device=self._process.device)
        for rows, draw in micro_batches:
            sums += _stacked(self.module(*self._moved(rows, draw)), weights)
        self.module.train(was_training)
        return self._means(sums, self._counts(micro_batches))

    def save(self, checkpoint: Path) -> None:
        """Write this rank's part into a checkpoint's folder. Collective."""
        folder, tag = str(checkpoint.parent), checkpoint.name
        self.engine.save_checkpoint(folder, tag=tag, save_latest=False)

    def load(self, checkpoint: Path) -> None:
        """Load weights and optimizer. Collective."""
        path, _ = self.engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None:
            raise FileNotFoundError("it lacks the files of DeepSpeed's engine")

    def load_method(self, checkpoint: Path) -> None:
        """Load nothing more: what is drawn depends on seed, step and row alone."""

    def _moved(self, rows: TokenRows, draw: Draw) -> tuple[TokenRows, Draw]:
        return rows.to(self._process.device), draw.to(self._process.device)

    def _counts(self, micro_batches: Asked) -> dict[str, int]:
        names = list(self._config.objective.weights)
        own = [sum(draw.counts[name] for _, draw in micro_batches) for name in names]
        total = sum_over(own, self._process.group, self._process.device)
        return dict(zip(names, total, strict=True))

    def _means(self, sums: Tensor, counts: dict[str, int]) -> dict[str, float]:
        total = sum_tensor(sums, self._process.group).tolist()
        return {
            name: value / counts[name] if counts[name] else 0.0
            for name, value in zip(counts, total, strict=True)
        }


def _stacked(losses: dict[str, Tensor], names: Any) -> Tensor:
    return torch.stack([losses[name].detach().double() for name in names])


def _require_stage(stage: int, process: Process, saved: Checkpoint | None) -> None:
    if stage == 3:
        raise ValueError(
            "run.deepspeed: zero_optimization.stage=3: helper and main model share one table of "
            "embeddings, which stage 3 cuts; set it to 0, 1 or 2"
        )
    if saved is not None and stage and saved.done.num_ranks != process.world_size:
        raise ValueError(
            f"run.resume: the run had {saved.done.num_ranks} ranks, which hold parts of the "
            f"optimizer's state under ZeRO stage {stage}, but this job has {process.world_size}; "
            f"start as many"
        )
