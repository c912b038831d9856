"""All families, by the ``model_type`` of their config."""

from __future__ import annotations

from typing import Any

from regate_ds.families.family import Family
from regate_ds.families.llava import LLAVA
from regate_ds.families.qwen_vl import QWEN2_5_VL, QWEN2_VL

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAVA, QWEN2_VL, QWEN2_5_VL)
}

STUDENTS = tuple(name for name, family in FAMILIES.items() if family.vision_inputs is not None)
"""Those that the recipe can train."""


def find_family(model: Any) -> Family | None:
    """The record of a model's family; None if there is none."""
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))


def family_of(model: Any) -> Family:
    """The record of a model's family; ValueError, naming those there are, if there is none."""
    family = find_family(model)
    if family is None:
        raise ValueError(
            f"{type(model).__name__} is of no known family; known are {sorted(FAMILIES)}: add a "
            "record to regate_ds/families/"
        )
    return family
