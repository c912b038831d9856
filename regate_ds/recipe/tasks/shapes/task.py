"""The record of the shapes task: arguments of `regate data shapes`, and sizes of its student."""

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
    "hidden_size": 160,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    # A head for each patch of a cell, which is five high and two wide.
    "num_attention_heads": 10,
    "hidden_act": "relu",
    "image_size": 100,
    "patch_size": 10,
    "projection_dim": 64,
}


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder that gets train.json, test.json and images/")
    parser.add_argument("--train", type=int, default=3000, metavar="N", help="training samples")
    parser.add_argument("--test", type=int, default=300, metavar="M", help="held-out samples")
    parser.add_argument("--seed", type=int, default=0, metavar="S")


def _build_data(args: Namespace) -> None:
    from regate_ds.recipe.tasks.shapes.scenes import build_shapes

    build_shapes(args.out, num_train=args.train, num_test=args.test, seed=args.seed)


def _make_student(train: Path, cache: Path, seed: int, fields: StudentFields) -> Path:
    from regate_ds.recipe.tasks.pretraining.alignment import AlignConfig
    from regate_ds.recipe.tasks.pretraining.phase import PhaseConfig
    from regate_ds.recipe.tasks.pretraining.student import PretrainConfig, Recipe, make_task_student
    from regate_ds.recipe.tasks.shapes.lessons import shapes_lessons

    text, vision = {**TEXT, **fields.text}, {**VISION, **fields.vision}
    config = PretrainConfig(
        text=text,
        vision=vision,
        vocab_size=512,
        max_length=256,
        seed=seed,
        # At a higher rate the projector does not learn the shape, the hardest of its words.
        words_phase=PhaseConfig(steps=2000, batch=512, lr=3e-3),
        words_scenes=800,
        # A cell has ten tokens: of a third of them nearly every cell keeps one.
        align_phase=AlignConfig(steps=360, batch=32, lr=3e-3, image_share=0.35, whole_every=8),
    )
    return make_task_student(train, cache, Recipe(number=1, lessons=shapes_lessons), config)


SHAPES_TASK = Task(
    about="small visual question set of drawn shapes: how they stand to each other, and how many",
    add_arguments=_add_arguments,
    build_data=_build_data,
    make_student=_make_student,
    config=Path("configs/shapes.yaml"),
    judged_by="accuracy_visual",
)
