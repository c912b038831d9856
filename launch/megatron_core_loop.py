#!/usr/bin/env python
"""A training loop around Megatron-core with elision; the lines that say `regate` are the change.

    torchrun --nproc-per-node 4 launch/megatron_core_loop.py --tensor 2 --pipeline 2

A small GPTModel learns to repeat its prompt. docs/megatron_core.md tells the story.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from regate_ds import Keyed, ReferenceStore, RegateConfig, Teacher, score_dataset
from regate_ds.adapters.megatron import attach
from regate_ds.adapters.megatron.samples import TeacherItems, teacher_batch

WORDS, LENGTH, NUM_SAMPLES, NUM_MICRO, ROWS = 64, 32, 256, 4, 4


class Samples(Dataset[dict[str, Tensor]]):
    """Items are like those of Megatron's data sets: labels are shifted; loss_mask is 1 where they
    count."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        size = int(torch.randint(3, LENGTH // 2 - 1, (), generator=generator))
        prompt = torch.randint(1, WORDS, (size,), generator=generator)
        text = torch.nn.functional.pad(prompt.repeat(2), (0, LENGTH + 1 - 2 * size))
        mask = torch.zeros(LENGTH)
        mask[size - 1 : 2 * size - 1] = 1.0
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": mask}


def score(store: Path) -> None:
    """Compute the teacher's losses once, on the first rank alone.

    Use the student's own text model as the teacher; the one here has random weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    # Every run must have the same teacher, because a store holds the losses of one.
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_hidden_layers=1, **sizes))
    data = Keyed(TeacherItems(Samples()), "train")
    alone = dist.new_group([0], backend="gloo")
    if dist.get_rank() == 0:
        score_dataset(data, teacher_batch, Teacher(model=model, pad_id=0), store, alone)
    dist.barrier()


def join(tensor: int, pipeline: int) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mpu.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)


def build() -> list[nn.Module]:
    """Build this rank's chunks, wrapped as the schedule expects them."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=mpu.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        # Regate requires these of a host: unfused rotary positions, and losses counted by token.
        apply_rope_fusion=False,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )
    gpt = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        WORDS,
        LENGTH,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return [DistributedDataParallel(config, DistributedDataParallelConfig(), gpt.to(device))]


def batches() -> Iterator[dict[str, Tensor]]:
    """Yield the micro-batches of this data rank, epoch after epoch."""
    data = Keyed(Samples(), "train")  # regate: an item says its key
    size, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    sampler = DistributedSampler(data, size, rank, drop_last=True)
    for epoch in range(1_000_000):
        sampler.set_epoch(epoch)
        yield from DataLoader(data, ROWS, sampler=sampler, drop_last=True)


def forward_step(iterator: Iterator[dict[str, Tensor]], model: nn.Module) -> Any:
    batch, device = next(iterator), next(model.parameters()).device
    tokens, labels, mask = (batch[name].to(device) for name in ("tokens", "labels", "loss_mask"))
    positions = torch.arange(LENGTH, device=device).expand_as(tokens)
    losses = model(tokens, positions, None, labels=labels)

    def loss(losses: Tensor) -> Any:
        total = (losses.float() * mask).sum()
        return total, mask.sum().int(), {"lm loss": torch.stack([total.detach(), mask.sum()])}

    return losses, loss


def train(options: argparse.Namespace) -> None:
    chunks = build()
    store = ReferenceStore(options.out / "store")  # regate
    regate = attach(chunks, RegateConfig(), total_steps=options.steps, reference=store)
    forward_backward = regate.wrap(get_forward_backward_func())
    settings = OptimizerConfig(optimizer="adam", lr=0.003, clip_grad=1.0)
    optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    iterator = batches()
    for step in range(options.steps):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterator,
            model=chunks,
            num_microbatches=NUM_MICRO,
            seq_length=LENGTH,
            micro_batch_size=ROWS,
            forward_only=False,
        )
        applied, _, _ = optimizer.step()
        regate.step(applied=applied)
        # The last rank is on the last stage, which has the losses.
        if dist.get_rank() == dist.get_world_size() - 1:
            counts = regate.metrics()
            total, count = sum(report["lm loss"] for report in reports).tolist()
            kept = f"{counts['answer_kept']} of {counts['answer_total']} answer tokens"
            print(f"step {step}: loss {total / count:.3f}, {kept}", flush=True)
    regate.save(options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/megatron_core_loop"))
    options = parser.parse_args()
    join(options.tensor, options.pipeline)
    score(options.out / "store")
    train(options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
