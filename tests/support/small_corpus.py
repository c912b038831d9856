"""A data set and a student of the smallest sensible size, made in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from regate_ds.recipe.students.llava import build_llava
from regate_ds.recipe.students.student import save_student
from regate_ds.recipe.tasks.digits.scenes import build_digits
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer

TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 12,
    "projection_dim": 32,
}


def make_corpus(
    folder: Path, *, num_train: int = 40, num_test: int = 10, text: Mapping[str, Any] = TEXT
) -> None:
    """data/, student/ and run.yaml in ``folder``."""
    build_digits(folder / "data", num_train=num_train, num_test=num_test, seed=0)
    records = json.loads((folder / "data" / "train.json").read_text())
    texts = [part["value"] for record in records for part in record["conversations"]]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    save_student(build_llava(tokenizer, text=text, vision=VISION, seed=0), folder / "student")
    config = {
        "model": {"path": str(folder / "student")},
        "data": {
            "name": "mine",
            "train": str(folder / "data" / "train.json"),
            "test": str(folder / "data" / "test.json"),
            "max_length": 256,
            "num_workers": 0,
        },
        "teacher": {"store": str(folder / "store"), "tokens_per_batch": 1024},
        "elision": {
            "schedule": {"warmup": 2, "final_dense_share": 0.16},
            "images": {"keep_share": 0.5},
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "schedule": "constant"},
        "run": {
            "out": str(folder / "run"),
            "steps": 12,
            "micro_batch": 2,
            "accumulation": 2,
            "precision": "fp32",
            "save_every": 6,
            "deepspeed": {"zero_optimization": {"stage": 2}},
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
