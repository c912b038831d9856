"""Build AdamW and its learning-rate schedule: a linear warm-up, then a cosine or a constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from regate_ds.settings.refuse import require


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the parameters that are not frozen.

    Matrices get weight decay; biases, norms and other vectors do not.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def make_lr_schedule(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int
) -> LambdaLR:
    """Build a schedule that rises linearly in the warm-up, then follows half a cosine or stays."""
    return LambdaLR(optimizer, lr_share(config, total_steps))


def lr_share(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Return a function that gives the share of the highest learning rate at a step."""
    warmup = config.warmup_steps
    num_warmup = round(warmup * total_steps) if warmup < 1 else int(warmup)

    def share(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        if config.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - num_warmup) / max(1, total_steps - num_warmup))
        falling = 0.5 * (1.0 + math.cos(math.pi * progress))
        return config.min_lr_share + (1.0 - config.min_lr_share) * falling

    return share


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW, its schedule and gradient clipping."""

    lr: float = 2e-5
    """Highest learning rate."""

    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases, norms and other vectors have none."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""

    eps: float = 1e-8
    """Number added to the root of the running mean of the squared gradient."""

    warmup_steps: float = 0.03
    """Steps of linear warm-up: a count, or a share of the run's steps below 1."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""

    min_lr_share: float = 0.0
    """Share of `lr` at the end of a cosine."""

    grad_clip: float | None = 1.0
    """Largest norm of the whole gradient; null does not clip."""

    def __post_init__(self) -> None:
        require(self, "lr", self.lr > 0, "must be above 0")
        require(self, "weight_decay", self.weight_decay >= 0, "must be 0 or more")
        require(self, "betas", all(0 <= b < 1 for b in self.betas), "must be in [0, 1)")
        require(self, "eps", self.eps > 0, "must be above 0")
        require(self, "warmup_steps", self.warmup_steps >= 0, "must be 0 or more")
        is_valid = self.warmup_steps < 1 or float(self.warmup_steps).is_integer()
        require(self, "warmup_steps", is_valid, "must be a whole number, or a share below 1")
        require(self, "min_lr_share", 0 <= self.min_lr_share <= 1, "must be in [0, 1]")
        is_valid = self.grad_clip is None or self.grad_clip > 0
        require(self, "grad_clip", is_valid, "must be above 0; null does not clip")
