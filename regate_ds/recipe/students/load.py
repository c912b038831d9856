"""Load a student from a folder, or make one from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
)

from regate_ds.data.chat.vision import ProcessorVision
from regate_ds.families.table import ALL_STUDENTS, FAMILIES, STUDENTS
from regate_ds.recipe.students.config import ModelConfig
from regate_ds.recipe.students.internvl import build_internvl
from regate_ds.recipe.students.llava import build_llava
from regate_ds.recipe.students.processor import load_processor, names_a_template
from regate_ds.recipe.students.qwen2_vl import build_qwen2_vl
from regate_ds.recipe.students.student import Student, fresh_model
from regate_ds.teacher.loading import load_weights, read_files, refuse_adapters


def load_student(
    folder: Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    attention: str = "sdpa",
    weights: bool = True,
    own_template: bool = False,
) -> Student:
    """Load what ``save_student`` or the model's publisher wrote; nothing is downloaded.

    dtype: None keeps the one in which the weights are stored.

    Without ``weights`` the model is on "meta": it has shapes, but cannot run. Its image inputs are
    made by the folder's own processor if that has a chat template, unless samples are written by
    our ``own_template``.

    Raises:
        ValueError: the folder holds no model, or one of an unsupported type.
    """
    refuse_adapters(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder of a saved model")
    config: Any = read_files(AutoConfig, folder)
    family = FAMILIES.get(config.model_type)
    if family is None or config.model_type not in ALL_STUDENTS:
        raise ValueError(
            f"{folder} is a {config.model_type} model; students are one of {list(ALL_STUDENTS)}, "
            "give the folder of one"
        )
    has_template = not own_template and names_a_template(folder)
    if not has_template and family.vision_inputs is None:
        raise ValueError(
            f"{folder} is a {config.model_type} model, which is trained by its processor's chat "
            f"template alone; {_MISSING[own_template]}, or take one of {sorted(STUDENTS)}"
        )
    own = load_processor(folder, config.model_type) if has_template else None
    model_class = family.load_class()
    if weights:
        kept = "auto" if dtype is None else dtype
        model = load_weights(model_class, folder, dtype=kept, attn_implementation=attention)
    else:
        # As transformers' own loading notes it, for the model that is written in the end.
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            part.dtype = dtype
        model = fresh_model(model_class, config, seed=None)
    if own is not None:
        patch = own.tokenizer.convert_ids_to_tokens(config.image_token_id)
        return Student(model, own.tokenizer, ProcessorVision(own, patch))
    assert family.vision_inputs is not None
    tokenizer = read_files(AutoTokenizer, folder)
    processor = read_files(AutoImageProcessor, folder, backend="pil")
    vision: Any = family.vision_inputs(config, processor)
    return Student(model, tokenizer, vision)


_MISSING = {
    True: "set data.template=null",
    False: "put its processor_config.json and chat_template.jinja into the folder",
}
"""What makes a chat template be used, by whether data.template is given."""

_BUILDERS = {"llava": build_llava, "qwen2_vl": build_qwen2_vl, "internvl": build_internvl}


_TRANSFORMERS_ERRORS = (
    StrictDataclassError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
"""Errors of transformers where a value of the user's own config dicts is of a wrong kind."""


def make_student(config: ModelConfig, *, seed: int | None, own_template: bool = False) -> Student:
    """Load the student from a directory, or make it from `text` and `vision` with fresh weights.

    With ``seed`` None the model is on "meta", without weights. own_template: as in
    ``load_student``.
    """
    if config.path is not None:
        attention = config.attn_implementation
        return load_student(
            config.path,
            attention=attention,
            weights=seed is not None,
            own_template=own_template,
        )
    if config.tokenizer is None:
        raise ValueError(
            "model.tokenizer=None: a student made from `text` and `vision` needs one; name a "
            "tokenizer's folder"
        )
    if not Path(config.tokenizer).is_dir():
        raise ValueError(
            f"model.tokenizer={config.tokenizer}: no such folder; name a tokenizer's folder"
        )
    tokenizer = read_files(AutoTokenizer, Path(config.tokenizer))
    build, parts = _BUILDERS[config.kind], {"text": config.text, "vision": config.vision}
    try:
        student = build(tokenizer, **parts, seed=seed)
    except _TRANSFORMERS_ERRORS as error:
        raise ValueError(
            f"model.kind={config.kind}: transformers makes no model of {parts}; correct model.text "
            f"or model.vision ({type(error).__name__}: {error})"
        ) from error
    student.model.set_attn_implementation(config.attn_implementation)
    return student
