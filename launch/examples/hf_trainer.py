"""``transformers.Trainer`` under DeepSpeed with ReGATE in it (docs/trainer.md).

deepspeed launch/examples/hf_trainer.py STUDENT DATA.json OUT [--dense] [--resume]

STUDENT is the folder of a LLaVA model, DATA.json has questions in LLaVA's format, OUT gets the
checkpoints. The reference losses are computed into OUT/reference if they are not there.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from questions import Questions, parser
from transformers import LlavaForConditionalGeneration, TrainingArguments

from regate_ds import Keyed, ReferenceStore, RegateConfig, Teacher, score_dataset
from regate_ds.adapters.trainers.hf_trainer import RegateTrainer
from regate_ds.teacher.backbone import text_backbone

STEPS = 4
DS = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
}


def main(argv: list[str] | None = None) -> Any:
    options = parser()
    options.add_argument("--resume", action="store_true", help="from the newest checkpoint")
    args = options.parse_args(argv)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None if torch.cuda.is_available() else "gloo")
    device = deepspeed.get_accelerator().current_device_name()
    model = LlavaForConditionalGeneration.from_pretrained(args.student).to(device)
    questions = Questions(args.data, args.student, model.config.image_seq_length)
    data, collate = Keyed(questions, "mine"), questions.collate()

    store = args.out / "reference"
    if not args.dense:
        teacher = Teacher(
            model=text_backbone(model),
            pad_id=questions.tokenizer.pad_token_id,
            image_token_id=model.config.image_token_id,
        )
        score_dataset(data, collate, teacher, store, torch.distributed.group.WORLD)

    # Only now: under ZeRO-3 they make every model that is loaded later without its weights.
    settings = TrainingArguments(
        output_dir=str(args.out),
        deepspeed=DS,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_steps=2,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )
    trainer = RegateTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        eval_dataset=Keyed(questions, "test"),
        data_collator=collate,
        regate=RegateConfig(enabled=not args.dense),
        reference=None if args.dense else ReferenceStore(store),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    return trainer


if __name__ == "__main__":
    main()
