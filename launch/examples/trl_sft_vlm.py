"""TRL's ``SFTTrainer`` on a vision-language model, with ReGATE in it (docs/trl.md).

python launch/examples/trl_sft_vlm.py STUDENT DATA.json OUT [--dense] [--deepspeed DS.json]

STUDENT is the folder of a LLaVA model with its processor, whose chat template marks what the
assistant says (``{% generation %}``). DATA.json has questions in LLaVA's format, OUT gets the
checkpoints; DS.json may name a ZeRO stage, for several ranks (``deepspeed``, ``torchrun``). The
lines that say ``regate`` or ``Scored`` are what ReGATE adds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import SFTConfig

from regate_ds import RegateConfig
from regate_ds.adapters.trainers.scored import Scored
from regate_ds.adapters.trainers.trl_sft import RegateSFTTrainer

STEPS = 4
ROLES = {"human": "user", "gpt": "assistant"}


def questions(path: Path) -> Dataset:
    """Return the records as TRL reads them: messages, and the images that belong to them."""
    rows = []
    for record in json.loads(path.read_text()):
        messages = [
            {"role": ROLES[turn["from"]], "content": turn["value"].replace("<image>", "").strip()}
            for turn in record["conversations"]
        ]
        rows.append({"messages": messages, "images": [str(path.parent / record["image"])]})
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def main(argv: list[str] | None = None) -> Any:
    options = argparse.ArgumentParser()
    options.add_argument("student", type=Path)
    options.add_argument("data", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--dense", action="store_true", help="the run you had before")
    options.add_argument("--deepspeed", type=Path, help="a configuration of DeepSpeed")
    options.add_argument("--local_rank", type=int, help="from the launcher")
    given = options.parse_args(argv)

    # Before SFTConfig, which with ZeRO-3 in it has later models made in parts.
    model = LlavaForConditionalGeneration.from_pretrained(given.student)
    processor = AutoProcessor.from_pretrained(given.student)
    args = SFTConfig(
        output_dir=str(given.out),
        deepspeed=given.deepspeed and str(given.deepspeed),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        assistant_only_loss=True,
        max_length=None,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )
    dataset = questions(given.data)

    trainer = RegateSFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=processor,
        regate=RegateConfig(enabled=not given.dense),
        reference=Scored(given.out / "reference"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
