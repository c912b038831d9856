"""All families, by the ``model_type`` of their config."""

from __future__ import annotations

from typing import Any

from regate_ds.families.family import Family
from regate_ds.families.grids import GRIDS
from regate_ds.families.internvl import INTERNVL
from regate_ds.families.llava import LLAVA
from regate_ds.families.qwen_vl import QWEN2_5_VL, QWEN2_VL
from regate_ds.families.squares import SQUARES

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (LLAVA, QWEN2_VL, QWEN2_5_VL, INTERNVL, *SQUARES, *GRIDS)
}

STUDENTS = tuple(name for name, family in FAMILIES.items() if family.vision_inputs is not None)
"""The ``model_type`` of each family that the recipe can train by the package's own template."""

PROCESSORS = {
    "aya_vision": "AyaVisionProcessor",
    "gemma3": "Gemma3Processor",
    "idefics3": "Idefics3Processor",
    "internvl": "InternVLProcessor",
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_next_video": "LlavaNextVideoProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "mistral3": "PixtralProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
    "smolvlm": "SmolVLMProcessor",
}
"""By ``model_type``: the class of processor whose chat template the recipe trains by. Tests show
that samples are those of the processor's own call."""

ALL_STUDENTS = tuple(sorted({*STUDENTS, *PROCESSORS}))
"""The ``model_type`` of each family that the recipe can train."""


def find_family(model: Any) -> Family | None:
    """Return the record of a model's family, or None if there is none."""
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def family_of(model: Any) -> Family:
    """Return the record of a model's family. ValueError, naming the families, if there is none."""
    family = find_family(model)
    if family is None:
        raise ValueError(
            f"{type(model).__name__} is of no known family; use one of {sorted(FAMILIES)}, or add "
            "a record to regate_ds/families/"
        )
    return family
