"""A Hugging Face model in DeepSpeed's own pipeline with ReGATE in it (docs/megatron_deepspeed.md).

deepspeed launch/examples/deepspeed_pipeline.py STUDENT DATA.json OUT [--dense]

STUDENT is the folder of a LLaVA model whose embeddings are not tied, DATA.json has questions in
LLaVA's format, OUT gets the reference losses and a checkpoint. The model is cut into two stages, so
that half of the job's ranks read different samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from questions import Questions, parser
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlavaForConditionalGeneration

from regate_ds import Keyed, ReferenceStore, RegateConfig, Teacher, score_dataset
from regate_ds.adapters.deepspeed.pipeline import attach_pipeline
from regate_ds.adapters.deepspeed.pipeline_student import pipeline_student
from regate_ds.teacher.backbone import text_backbone

STAGES, STEPS = 2, 4
DS = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def main(argv: list[str] | None = None) -> list[float]:
    args = parser().parse_args(argv)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None if torch.cuda.is_available() else "gloo")
    device = deepspeed.get_accelerator().current_device_name()
    model = LlavaForConditionalGeneration.from_pretrained(args.student).to(device)
    questions = Questions(args.data, args.student, model.config.image_seq_length)
    data, collate = Keyed(questions, "mine"), questions.collate()

    store = args.out / "reference"
    teacher = Teacher(
        model=text_backbone(model),
        pad_id=questions.tokenizer.pad_token_id,
        image_token_id=model.config.image_token_id,
    )
    score_dataset(data, collate, teacher, store, torch.distributed.group.WORLD)

    config = RegateConfig(enabled=not args.dense)
    student = pipeline_student(model, config, num_stages=STAGES, partition_method="uniform")
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=student, model_parameters=weights, config=DS)
    reference = None if args.dense else ReferenceStore(store)
    regate = attach_pipeline(engine, total_steps=STEPS, reference=reference)
    batches = micro_batches(data, regate.collate(collate), engine.grid)
    losses = []
    for _ in range(STEPS):
        losses.append(float(regate.train_batch(batches)))
        regate.step(applied=engine.was_step_applied())
    engine.save_checkpoint(str(args.out), tag="last")
    regate.save(args.out / "last")
    if engine.global_rank == 0:
        print("losses of the steps:", *(f"{loss:.3f}" for loss in losses), flush=True)
    return losses


def micro_batches(data: Any, collate: Any, grid: Any) -> Iterator[Any]:
    """Yield the micro-batches of this data rank, epoch after epoch; all stages get the same."""
    size, rank = grid.get_data_parallel_world_size(), grid.get_data_parallel_rank()
    sampler = DistributedSampler(data, size, rank, drop_last=True)
    for epoch in range(1_000_000):
        sampler.set_epoch(epoch)
        yield from DataLoader(data, 2, sampler=sampler, collate_fn=collate, drop_last=True)


if __name__ == "__main__":
    main()
