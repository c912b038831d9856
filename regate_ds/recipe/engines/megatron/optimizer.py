"""Megatron-core's optimizer, as the run's settings describe it."""

from __future__ import annotations

import torch
from megatron.core.optimizer import OptimizerConfig

from regate_ds.recipe.config.tree import RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of the weights, by `run.precision`."""


def optimizer_settings(config: RunConfig) -> OptimizerConfig:
    """Return the settings of AdamW as under DeepSpeed; Megatron too leaves vectors undecayed."""
    ours, is_half = config.optimizer, config.run.precision == "bf16"
    assert config.parallel is not None
    return OptimizerConfig(
        optimizer="adam",
        lr=ours.lr,
        weight_decay=ours.weight_decay,
        decoupled_weight_decay=True,
        adam_beta1=ours.betas[0],
        adam_beta2=ours.betas[1],
        adam_eps=ours.eps,
        clip_grad=ours.grad_clip or 0.0,
        bf16=is_half,
        params_dtype=DTYPES[config.run.precision],
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
