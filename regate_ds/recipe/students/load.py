"""Find a student, or make one, as a configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from regate_ds.recipe.students.config import ModelConfig
from regate_ds.recipe.students.llava import LlavaVision, build_llava
from regate_ds.recipe.students.qwen2_vl import Qwen2VLVision, build_qwen2_vl
from regate_ds.recipe.students.student import Student, fresh_model
from regate_ds.teacher.loading import readable_weights

_MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "llava": LlavaForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
}


def load_student(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    weights: bool = True,
) -> Student:
    """Load what ``save_student`` or the model's publisher wrote; nothing is downloaded.

    Without ``weights`` the model is on "meta": it can be asked, but not run.

    Raises:
        ValueError: not a folder with a model, or a model of an unsupported type.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; give the folder of a saved model")
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in _MODEL_CLASSES:
        raise ValueError(
            f"{folder} is a {config.model_type} model; students are one of {sorted(_MODEL_CLASSES)}"
        )
    model_class = _MODEL_CLASSES[config.model_type]
    if weights:
        with readable_weights(folder):
            model = model_class.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention, local_files_only=True
            )
    else:
        model = fresh_model(model_class, config, seed=None)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return Student(model, tokenizer, vision_of(config, processor))


def vision_tower(model: PreTrainedModel) -> nn.Module:
    """The part that turns pixels into features; a Qwen2-VL's holds its projector as well."""
    inner: Any = model.model
    return inner.visual if model.config.model_type == "qwen2_vl" else inner.vision_tower


def vision_of(
    config: LlavaConfig | Qwen2VLConfig, processor: BaseImageProcessor
) -> LlavaVision | Qwen2VLVision:
    """Choose by the model's config.

    Raises:
        ValueError: the image processor does not belong to the model.
    """
    if isinstance(config, LlavaConfig):
        return LlavaVision.of(config, processor)
    if not isinstance(processor, Qwen2VLImageProcessorPil):
        raise ValueError(
            f"image processor {type(processor).__name__} does not fit a {config.model_type} model; "
            "its folder needs a preprocessor_config.json of a Qwen2VLImageProcessor"
        )
    return Qwen2VLVision(processor)


_BUILDERS = {"llava": build_llava, "qwen2_vl": build_qwen2_vl}


_HOST_REFUSALS = (
    StrictDataclassError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    AssertionError,
)
"""What building a model ends in where a value of the user's own config dicts is of a wrong kind."""


def make_student(config: ModelConfig, *, seed: int | None) -> Student:
    """Load the student from a directory, or make it from `text` and `vision` with fresh weights.

    With ``seed`` None the model is on "meta", without weights.
    """
    if config.path is not None:
        attention = config.attn_implementation
        return load_student(config.path, attention=attention, weights=seed is not None)
    if config.tokenizer is None:
        raise ValueError("model.tokenizer=None: a student made from `text` and `vision` needs one")
    if not Path(config.tokenizer).is_dir():
        raise ValueError(f"model.tokenizer={config.tokenizer}: no such folder")
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, local_files_only=True)
    build, parts = _BUILDERS[config.kind], {"text": config.text, "vision": config.vision}
    try:
        student = build(tokenizer, **parts, seed=seed)
    except _HOST_REFUSALS as error:
        raise ValueError(
            f"model.kind={config.kind}: transformers makes no model of {parts}: "
            f"{type(error).__name__}: {error}"
        ) from error
    student.model.set_attn_implementation(config.attn_implementation)
    return student
