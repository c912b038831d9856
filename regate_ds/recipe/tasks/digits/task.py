"""The record of the digits task: arguments of `regate data digits`, and sizes of its student."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from regate_ds.recipe.tasks.task import StudentFields, Task

TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # The projector learns the embeddings of words; tied, they are also the head's.
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}

VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    # A head for each patch of a cell: see pretraining/own_cell.py.
    "num_attention_heads": 16,
    "hidden_act": "relu",
    "image_size": 96,
    "patch_size": 8,
    "projection_dim": 64,
}


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder that gets train.json, test.json and images/")
    parser.add_argument("--train", type=int, default=3000, metavar="N", help="training samples")
    parser.add_argument("--test", type=int, default=300, metavar="M", help="held-out samples")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--frames", type=int, metavar="F", help="make clips of F frames each")


def _build_data(args: Namespace) -> None:
    from regate_ds.recipe.tasks.digits import scenes

    scenes.build_digits(
        args.out, num_train=args.train, num_test=args.test, seed=args.seed, num_frames=args.frames
    )


def _make_student(train: Path, cache: Path, seed: int, fields: StudentFields) -> Path:
    from regate_ds.recipe.tasks.digits.lessons import digits_lessons
    from regate_ds.recipe.tasks.pretraining.student import PretrainConfig, Recipe, make_task_student

    text, vision = {**TEXT, **fields.text}, {**VISION, **fields.vision}
    # A clip is longer than a picture.
    config = PretrainConfig(text=text, vision=vision, max_length=640, seed=seed)
    return make_task_student(train, cache, Recipe(number=5, lessons=digits_lessons), config)


DIGITS_TASK = Task(
    about="small visual question set from real images of digits, in LLaVA's JSON format",
    add_arguments=_add_arguments,
    build_data=_build_data,
    make_student=_make_student,
    config=Path("configs/digits.yaml"),
    judged_by="accuracy_visual",
)
