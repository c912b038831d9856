"""A plain Hugging Face + DeepSpeed loop with ReGATE in it (docs/deepspeed_loop.md).

deepspeed launch/examples/deepspeed_loop.py STUDENT DATA.json OUT [--dense]

STUDENT is the folder of a LLaVA model, DATA.json has questions in LLaVA's format, OUT gets the
reference losses, a checkpoint and the losses of the steps.
"""

from __future__ import annotations

import json

import deepspeed
import torch
from questions import Questions, parser
from transformers import LlavaForConditionalGeneration

from regate_ds import Keyed, ReferenceStore, RegateConfig, Teacher, attach, score_dataset
from regate_ds.teacher.backbone import text_backbone

EPOCHS = 2
DS = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2},
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

    total_steps = EPOCHS * (len(data) // (4 * torch.distributed.get_world_size()))
    config = RegateConfig(enabled=not args.dense)
    regate = attach(model, config, total_steps=total_steps, reference=ReferenceStore(store))
    engine, _, loader, _ = deepspeed.initialize(
        model=model, training_data=data, collate_fn=regate.collate(collate), config=DS
    )
    losses = []
    for epoch in range(EPOCHS):
        loader.data_sampler.set_epoch(epoch)
        for window in regate.windows(loader, engine):
            total = 0.0
            for batch in window:
                output = engine(**batch)
                loss = regate.loss(output)
                engine.backward(loss)
                engine.step()
                total += float(loss.detach())
            regate.step(applied=engine.was_step_applied())
            mean = torch.tensor(total / len(window) / engine.dp_world_size, device=engine.device)
            torch.distributed.all_reduce(mean)
            losses.append(float(mean))
            if engine.global_rank == 0:
                print(f"step {len(losses)}: loss {losses[-1]:.3f}", flush=True)
    engine.save_checkpoint(str(args.out), tag="last")
    regate.save(args.out / "last")
    if engine.global_rank == 0:
        (args.out / "losses.json").write_text(json.dumps(losses))
    return losses


if __name__ == "__main__":
    main()
