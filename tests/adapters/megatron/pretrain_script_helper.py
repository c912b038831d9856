"""A pretrain script of the kind that Megatron-LM ships, on samples made up: no word of elision.

Samples are a prompt, an answer that repeats it, and padding. ``made(number)`` is the same in a
test's own process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

LENGTH, WORDS = 32, 50


def made(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    size = int(torch.randint(3, LENGTH // 2 - 1, (), generator=generator))
    prompt = torch.randint(1, WORDS, (size,), generator=generator)
    text = torch.nn.functional.pad(prompt.repeat(2), (0, LENGTH + 1 - 2 * size))
    loss_mask = torch.zeros(LENGTH)
    loss_mask[size - 1 : 2 * size - 1] = 1.0
    return {
        "tokens": text[:-1],
        "labels": text[1:],
        "loss_mask": loss_mask,
        "position_ids": torch.arange(LENGTH),
    }


class Samples(Dataset[dict[str, Tensor]]):
    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return made(int(number))


def provider(sizes: Any, vp_stage: int | None = None) -> tuple[Samples, Samples, Samples]:
    train, valid, test = (Samples(size) for size in sizes)
    return train, valid, test


provider.is_distributed = True  # type: ignore[attr-defined]


def loss_of(loss_mask: Tensor, output: Tensor) -> Any:
    total, count = (output.float() * loss_mask).sum(), loss_mask.sum()
    report = {"lm loss": torch.stack([total.detach(), count])}
    return total, count.int(), report


def forward_step(data_iterator: Any, model: Any) -> Any:
    from functools import partial

    from megatron.core import mpu, parallel_state
    from megatron.core.utils import get_batch_on_this_tp_rank
    from megatron.training import get_args

    args = get_args()
    names = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens")
    names += ("cu_seqlens_padded", "max_seqlen", "local_cp_size")
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        batch = next(data_iterator)
        batch |= {name: batch.get(name) for name in names}
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        cp_size=1,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_of, batch["loss_mask"])


def main() -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(container, provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
