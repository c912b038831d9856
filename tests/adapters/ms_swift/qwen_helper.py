"""Tiny Qwen-VL students as ms-swift loads them, without torchvision, which reads videos."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from swift.template.templates.qwen import Qwen2VLTemplate
from transformers.utils import is_torchvision_available

from regate_ds.recipe.students.processor import images_alone
from tests.support.chat_students import save
from tests.support.processors import processor

CLASSES = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


def save_qwen(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save a student that ms-swift can load: it knows image tokens by their released numbers."""
    save(name, folder)
    number = processor(name).tokenizer.convert_tokens_to_ids("<|image_pad|>")
    monkeypatch.setattr(Qwen2VLTemplate, "image_token_id", number)
    if not is_torchvision_available():
        for module in _no_videos():
            monkeypatch.setitem(sys.modules, module.__name__, module)
        load = images_alone(getattr(transformers, CLASSES[name])).from_pretrained
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", load)
    return folder


def _no_videos() -> list[ModuleType]:
    """What qwen_vl_utils imports and uses for videos alone."""
    names = ("torchvision", "torchvision.io", "torchvision.transforms")
    made: Any = [ModuleType(name) for name in names]
    for module in made:
        module.__spec__ = ModuleSpec(module.__name__, None)
    made[0].io, made[0].transforms, made[2].InterpolationMode = made[1], made[2], None
    return made
