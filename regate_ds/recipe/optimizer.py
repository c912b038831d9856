"""AdamW with linear warm-up and a cosine, as DeepSpeed takes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from regate_ds.recipe.config.sections import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Matrices decay; biases, norms and other vectors do not. Frozen parameters are left out."""
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
    """Rise linearly over the warm-up, then follow half a cosine (or stay)."""
    return LambdaLR(optimizer, lr_share(config, total_steps))


def lr_share(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Share of the highest learning rate at each step."""
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
