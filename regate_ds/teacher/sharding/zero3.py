"""The frozen teacher under ZeRO-3: every rank holds an equal piece of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from regate_ds.teacher.head_loss import IDS, HeadPart
from regate_ds.teacher.logits import logit_change
from regate_ds.teacher.sharding.tensor_parallel import (
    ShardedTeacher,
    is_tied,
    random_state_kept,
    renew_rotary,
    require_plain_weights,
)
from regate_ds.teacher.sharding.weights import WeightSource


def partitioned_teacher(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    empty: Callable[[], Any] | None = None,
) -> ShardedTeacher:
    """Build a teacher without values; every rank of the world holds a piece of each tensor.

    empty: makes the model; None: transformers' causal language model of this config.

    A layer is gathered to run, so all ranks must score equally often. Collective over the world.
    ValueError for an architecture that is not built like Llama.
    """
    require_plain_weights(config)
    build = empty or partial(AutoModelForCausalLM.from_config, config, dtype=dtype)
    require_partitionable(config, build)
    settings = _zero3_settings(dtype)
    with random_state_kept(), no_init_weights():
        # No dtype=: deepspeed 0.19.8 would take bf16 in its place where fp16 is not supported.
        with deepspeed.zero.Init(config_dict_or_path=settings):
            whole: Any = build()
        if is_tied(config):
            whole.lm_head.weight = whole.model.embed_tokens.weight
        change = logit_change(whole)
        engine, *_ = deepspeed.initialize(model=whole.model, config=settings)
    decoder: Any = engine.module
    renew_rotary(decoder, config, device)
    return ShardedTeacher(config, decoder, _GatheredHead(whole.lm_head, change=change))


@torch.no_grad()
def fill_partitioned(teacher: ShardedTeacher, weights: WeightSource | None) -> None:
    """Fill a ``partitioned_teacher`` tensor by tensor. Collective over the world.

    weights: the source on the world's first rank, None on all others.
    """
    for whole_name, module, name in teacher.weights_by_name():
        parameter = module.get_parameter(name)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if weights is not None:
                parameter.copy_(weights.read(whole_name))


def require_partitionable(config: Any, build: Callable[[], Any]) -> None:
    """Refuse, by ValueError, a model with parts other than a decoder with rotary positions and a
    head: other tables that it computes when built would silently have the weights' dtype."""
    with torch.device("meta"):
        whole = build()
    parts = {name for name, _ in whole.named_children()}
    others = [n for n, _ in whole.named_buffers() if not n.startswith("model.rotary_emb.")]
    if parts != {"model", "lm_head"} or others or not hasattr(whole.model, "rotary_emb"):
        raise ValueError(
            f"teacher.sharding=zero3: a {config.model_type} model is not built like Llama; use "
            "another teacher, or teacher.sharding=none"
        )


class _GatheredHead(HeadPart):
    """A head in ZeRO-3's pieces, gathered while a batch is scored."""

    def losses(self, hidden_NH: Tensor, labels_N: Tensor, num_ids: int = IDS) -> Tensor:
        with deepspeed.zero.GatheredParameters(list(self.parameters())):
            return super().losses(hidden_NH, labels_N, num_ids)


def _zero3_settings(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
