"""How a tiny multimodal config is made of a family's own parts."""

from __future__ import annotations

from typing import Any

from tests.families.zoo.sizes import VISION, shrink, tiny_config
from tests.families.zoo.texts import TEXTS

Fields = dict[str, Any]


def tiny_multimodal(
    model_type: str,
    *,
    decoder: str | None = None,
    text: Fields | None = None,
    vision: Fields | None = None,
    **top: Any,
) -> Any:
    """Return a tiny config.

    decoder: the ``model_type`` of another decoder than the family's default.
    text, vision: fields of the inner configs; top: those of the outer one.
    """
    fields = shrink(model_type)
    inner = shrink(decoder) if decoder else fields.get("text_config")
    if inner is not None:
        top["text_config"] = {**inner, **TEXTS.get(inner["model_type"], {}), **(text or {})}
    if "vision_config" in fields:
        top["vision_config"] = {**fields["vision_config"], **(vision or {})}
    return tiny_config(model_type, **top)


def tower(model_type: str, **special: Any) -> Fields:
    """Return the fields of a tiny vision tower, for a family that has none by default."""
    return shrink(model_type, sizes=VISION, **special)
